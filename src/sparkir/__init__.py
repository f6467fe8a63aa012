"""sparkir: small, truly quantized image-restoration networks that look like their teachers."""
