"""Export to runtimes, and the proof that they agree with the integer reference."""
