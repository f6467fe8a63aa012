"""Distillation losses and the task that puts student, teacher and weighting together."""
