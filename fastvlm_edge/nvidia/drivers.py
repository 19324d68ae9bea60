"""Open CUDA through the Python binding that is installed: cuda-python first, then PyCUDA."""

from __future__ import annotations

from fastvlm_edge.errors import FastVLMError, one_line
from fastvlm_edge.extras import gpu_extra, install_advice
from fastvlm_edge.nvidia import cuda_python, pycuda_driver
from fastvlm_edge.nvidia.cuda import Cuda


def open_cuda() -> Cuda:
    """Open device 0 with the binding that is installed.

    Raises FastVLMError if there is no binding, driver or device, or if the driver is too old for the binding.
    """
    try:
        module, binding = cuda_python.load()
    except ModuleNotFoundError:
        pass
    except Exception as error:  # a package that is broken may raise anything
        raise FastVLMError(
            f"cuda-python is installed but cannot be loaded ({one_line(error)})", "run: pip install --force-reinstall cuda-bindings"
        ) from error
    else:
        return cuda_python.CudaPython(module, binding)
    try:
        module, binding = pycuda_driver.load()
    except ModuleNotFoundError:
        raise FastVLMError(
            "CUDA is used through the package cuda-python, which is not installed", install_advice(gpu_extra(), "cuda")
        ) from None
    return pycuda_driver.PyCuda(module, binding)
