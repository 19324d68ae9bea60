"""The demo model with its checkpoint, and three questions about three pictures (`make demo`)."""
