"""The page: records of one or more runs as one HTML file that needs nothing else. Loads no heavy library."""

from .page import build

__all__ = ["build"]
