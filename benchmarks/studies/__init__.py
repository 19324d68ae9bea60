"""Finished measurements, frozen; see README.md."""
