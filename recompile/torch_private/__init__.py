"""The private torch APIs that we use, one small module each, so that a new torch version breaks few lines."""
