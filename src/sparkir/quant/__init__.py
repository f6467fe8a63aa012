"""Quantizers, preparing a network for QAT, and the integer network it becomes."""
