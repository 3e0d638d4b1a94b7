"""The pattern language, the matcher and its refusals: what pass authors write with."""
