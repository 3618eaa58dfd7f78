"""The version of qpass; it goes into every file that qpass writes."""

from typing import Final

__version__: Final = "0.1.0"
