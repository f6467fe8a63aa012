"""Whole picture files through a network: tiles, memory, formats. Imports no torch."""
