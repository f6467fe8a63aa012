"""sparkir: small, truly quantized image-restoration networks that look like their teachers."""

from importlib.metadata import version

from sparkir.errors import SparkirError

__version__ = version("sparkir")
__all__ = ["SparkirError", "__version__"]
