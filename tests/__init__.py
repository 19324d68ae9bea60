"""Tests. Importing the toolkit first switches off onnxruntime's telemetry, also for tests that import onnxruntime themselves."""

import fastvlm_edge  # noqa: F401
