"""Region ops and the code generators for them."""
