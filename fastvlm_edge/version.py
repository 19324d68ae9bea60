"""The version of the toolkit. Every manifest and record contains it."""

__version__ = "0.1.0"
