"""How the demo model was made: the scene generator, the model, and its training."""
