"""The version of the toolkit, also written into every manifest."""

__version__ = "0.1.0"
