"""What `scenes.py` draws with: a canvas, and the meters, objects and signs on it, each with its questions."""
