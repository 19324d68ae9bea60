"""Frames of video: the newest of a source that goes on, and those of a clip for one question."""
