"""Metrics with their conventions, inference on whole images, statistics."""
