"""FastVLM in transformers and timm, the implementation to compare with; `examples/checkpoints/in_transformers.py` has the code."""

from examples.checkpoints.in_transformers import import_timm, load_reference

__all__ = ["import_timm", "load_reference"]
