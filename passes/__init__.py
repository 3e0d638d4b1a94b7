"""The rewrites, one per file. Importing this package registers them."""

from . import fuse_lookups

__all__ = ["fuse_lookups"]
