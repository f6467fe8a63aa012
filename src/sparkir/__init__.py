"""sparkir: small, truly quantized image-restoration networks that look like their teachers."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from sparkir.errors import SparkirError

if TYPE_CHECKING:
    from sparkir.spark.module import Spark

__version__ = version("sparkir")
__all__ = ["Spark", "SparkirError", "__version__"]


def __getattr__(name: str) -> object:
    """Import what needs torch when it is asked for: restoring an exported file does without."""
    if name == "Spark":
        from sparkir.spark.module import Spark

        return Spark
    raise AttributeError(f"module 'sparkir' has no attribute {name!r}")
