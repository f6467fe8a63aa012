"""Images in: folders to a memory-mapped store, degradations, cropped pairs."""
