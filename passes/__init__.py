"""The rewrites, one per file. Importing this package registers them."""

from . import canonicalize, fuse_lookups, pool_sequences

__all__ = ["canonicalize", "fuse_lookups", "pool_sequences"]
