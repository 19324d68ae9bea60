"""Measurements, also of peers in environments of their own, which do not load the toolkit."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in fastvlm_edge/__init__.py
