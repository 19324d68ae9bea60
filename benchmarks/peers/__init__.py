"""Compares FastVLM with other runtimes. `run` starts one script for each of them; each script has its own Python environment."""
