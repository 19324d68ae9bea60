"""Examples; run them from the root of a clone."""
