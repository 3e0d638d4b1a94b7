"""The rewrites, one per file. Importing this package registers them."""

from . import canonicalize, common_subexpressions, dead_code, fuse_lookups, pool_sequences

__all__ = ["canonicalize", "common_subexpressions", "dead_code", "fuse_lookups", "pool_sequences"]
