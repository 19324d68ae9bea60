"""Compares FastVLM with other runtimes: `run` starts one script of `runtimes/` for each of them."""
