"""The rewrites, one per file."""
