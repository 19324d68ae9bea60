"""Checkpoints to try things with: one of random weights, and transformers' own FastVLM to compare with. Used by tests and benchmarks."""
