"""The `recompile::lookup` region op: a group of table lookups."""
