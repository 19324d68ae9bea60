"""Where onnxruntime spends its time, by operator: the profile behind the figures of `cpu.py`."""

from __future__ import annotations

import collections
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fastvlm_edge.backends.ort_session import graph_name, ort_value, session_options
from fastvlm_edge.model_dir.manifest import Manifest, read_manifest

RUNS = {"vision": 3, "prefill": 3, "decode": 30}


def by_operator(model: Path, what: str, threads: int) -> dict[str, float]:
    """Milliseconds of one run by operator, largest first; those under 1 % are added up as `other`. The profiler itself adds some.

    `what` is `vision`, `prefill` or `decode`.
    """
    manifest = read_manifest(model)
    graph = model / graph_name("vision" if what == "vision" else "decoder", manifest, cuda=False)
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(graph, threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        values = {name: ort_value(np.ascontiguousarray(array), str(array.dtype)) for name, array in _feeds(manifest, what).items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            if output.name.startswith("present"):  # the graph for the CPU appends to the cache in place
                binding.bind_ortvalue_output(output.name, values[output.name.replace("present", "past_key_values")])
            elif output.name != "logits":
                binding.bind_output(output.name)
        for _ in range(RUNS[what] + 1):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    each = len(kernels) // (RUNS[what] + 1)
    total: collections.Counter[str] = collections.Counter()
    for event in kernels[each:]:  # the first run warms up
        total[event["args"]["op_name"]] += event["dur"] / 1e3 / RUNS[what]
    everything = sum(total.values())
    large = {name: round(value, 2) for name, value in total.most_common() if value >= everything / 100}
    return {**large, "other": round(everything - sum(large.values()), 2), "all": round(everything, 2)}


def _feeds(manifest: Manifest, what: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    if what == "vision":
        size = manifest.vision.image_size
        return {"pixel_values": rng.random((1, 3, size, size), dtype=np.float32)}
    spec = manifest.decoder
    seq, start, capacity = (290, 0, 512) if what == "prefill" else (1, 300, 512)
    cache = np.zeros((spec.layers, 2, 1, spec.kv_heads, capacity, spec.head_dim), np.float32)
    past = {f"past_key_values.{i}.{part}": cache[i, j] for i in range(spec.layers) for j, part in enumerate(("key", "value"))}
    return {
        "input_ids": rng.integers(0, 500, (1, seq)),
        "position_ids": np.arange(start, start + seq)[None],
        "image_features": np.zeros((1, spec.hidden), np.float32),
        "logit_positions": np.array([[seq - 1]]),
        **past,
    }
