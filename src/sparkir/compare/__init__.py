"""Many methods from one start, scored side by side."""
