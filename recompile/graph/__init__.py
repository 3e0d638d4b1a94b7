"""Questions about an FX graph: shapes, users, order."""
