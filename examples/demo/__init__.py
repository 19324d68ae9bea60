"""The demo checkpoint, and what makes the packaged demo of it (`fastvlm-edge demo`)."""
