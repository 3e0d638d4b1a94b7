"""The rewrites, one per file. Importing this package registers them."""

from . import (
    canonicalize,
    common_subexpressions,
    dead_code,
    fold_pairwise_linear,
    functionalize,
    fuse_lookups,
    pool_sequences,
    rewrite_attention,
    scale_queries,
)

__all__ = [
    "canonicalize",
    "common_subexpressions",
    "dead_code",
    "fold_pairwise_linear",
    "functionalize",
    "fuse_lookups",
    "pool_sequences",
    "rewrite_attention",
    "scale_queries",
]
