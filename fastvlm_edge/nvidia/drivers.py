"""The CUDA driver through whichever Python binding is installed: cuda-python first, then PyCUDA."""

from __future__ import annotations

from fastvlm_edge.errors import FastVLMError
from fastvlm_edge.nvidia import cuda_python, pycuda_driver
from fastvlm_edge.nvidia.cuda import Cuda


def open_cuda() -> Cuda:
    """Open device 0 with the binding that is installed.

    Raises FastVLMError naming what is missing: binding, driver, a device, or a driver new enough.
    """
    try:
        module, binding = cuda_python.load()
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        raise FastVLMError(
            f"cuda-python is installed but cannot be loaded ({error}); run: pip install --force-reinstall cuda-bindings"
        ) from error
    else:
        return cuda_python.CudaPython(module, binding)
    try:
        module, binding = pycuda_driver.load()
    except ModuleNotFoundError:
        raise FastVLMError(
            "CUDA is reached through cuda-python, which is not installed; run: pip install 'fastvlm-edge[tensorrt]'"
        ) from None
    return pycuda_driver.PyCuda(module, binding)
