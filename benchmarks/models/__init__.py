"""Plain PyTorch models to measure: nothing in them knows of recompile."""
