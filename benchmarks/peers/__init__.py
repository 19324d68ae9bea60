"""FastVLM beside its peers: `run` drives one script for each of them, every one in an environment of its own."""
