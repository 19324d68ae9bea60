"""Findings on onnxruntime-gpu, which `--backend ort-cuda` needs: whether it is alone, and whether it has kernels for this GPU."""

from __future__ import annotations

from fastvlm_edge.doctor.facts import Facts
from fastvlm_edge.doctor.findings import Finding, ok, warning
from fastvlm_edge.machine.libraries import too_old

WHEEL = "1.31.1"
WHEEL_GPUS = {
    "x86_64": ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)),
    "aarch64": ((8, 9), (9, 0), (12, 0), (12, 1)),
}
"""Compute capabilities with kernels in the wheels of onnxruntime-gpu 1.31.1 on PyPI, by architecture, read from the headers of the fat
binaries in libonnxruntime_providers_cuda.so. There is no PTX, which other GPUs could compile."""
JOINS_PRODUCTS = (1, 25)
"""The first version that joins DequantizeLinear and MatMul where the floats are FP16 or BF16, seen in its optimised graphs."""
INSTALL_GPU = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "onnxruntime-gpu[cuda,cudnn]"'
INSTALL_CPU = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"


def has_kernels(architecture: str, capability: tuple[int, int], *, jetson: bool) -> bool:
    """Whether a wheel from PyPI runs on a GPU.

    A kernel runs on its own compute capability and on later minor ones, but a kernel for desktop GPUs does not run on a Jetson (CUDA C++
    Programming Guide, binary compatibility).
    """
    built = WHEEL_GPUS.get(architecture, ())
    return capability in built or (not jetson and any(major == capability[0] and minor <= capability[1] for major, minor in built))


def check_onnxruntime(facts: Facts) -> list[Finding]:
    """No finding if there is nothing to say: onnxruntime for the CPU is one of the packages that every part needs."""
    python, capability = facts.python, facts.compute_capability
    cpu, gpu = python.onnxruntime_cpu, python.onnxruntime_gpu
    supported = capability is not None and has_kernels(facts.system.architecture, capability, jetson=facts.jetson is not None)
    if cpu and gpu:
        text = (
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed, in the same directory: the one that came last has "
            "overwritten the other, and often the GPU is gone"
        )
        return [warning("onnxruntime", text, INSTALL_GPU if supported else INSTALL_CPU)]
    if too_old(gpu, JOINS_PRODUCTS):
        text = f"onnxruntime-gpu {gpu} makes floats of all INT8 and INT4 weights in every step, so --backend ort-cuda is slow with them"
        return [
            warning("onnxruntime", text, f"use TensorRT, an FP16 model, or onnxruntime-gpu {'.'.join(map(str, JOINS_PRODUCTS))} or newer")
        ]
    if capability is None or supported:
        return [ok("onnxruntime", f"onnxruntime-gpu {gpu}")] if gpu else []
    lacking = f"the wheels of onnxruntime-gpu on PyPI ({WHEEL}) have no kernels for compute capability {'.'.join(map(str, capability))}"
    if gpu:
        text = f"onnxruntime-gpu {gpu}: {lacking}, so --backend ort-cuda needs one that was built for this GPU"
        return [warning("onnxruntime", text, f"{INSTALL_CPU} (or keep a wheel that was built for this GPU)")]
    return [ok("onnxruntime", f"{lacking}: use TensorRT for the GPU")]
