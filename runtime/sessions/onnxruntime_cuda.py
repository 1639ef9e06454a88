"""Whether ONNX Runtime's CUDA provider can run here, and what it lacks: asked before a session is made.

ONNX Runtime itself only logs that the provider did not load, and makes a session for the CPU, which then answers every
binding to the device with "CUDA Provider not available".
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

from ditc.runtime.gpu import NO_GPU, find_gpu

log = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
# Two wheels write the same files, and ditc requires the CPU's: an extra would install both, the CPU's last.
INSTALL = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "onnxruntime-gpu[cuda,cudnn]"'


@cache
def cuda_lack() -> str:
    """Why the CUDA provider cannot run here, one line; "" if it can."""
    import numpy as np
    import onnxruntime as ort

    if CUDA not in ort.get_available_providers():
        return f"this ONNX Runtime has no CUDA provider: {', '.join(ort.get_available_providers())}"
    if find_gpu() is None:
        return NO_GPU
    with redirect_stdout(
        io.StringIO()
    ):  # CUDA and cuDNN from PyPI lie where no loader looks; what it lacks, it prints
        ort.preload_dlls()
    ort.set_default_logger_severity(4)  # fatal: it would log what we say
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0)
    except Exception as e:  # onnxruntime raises classes of its C API that share no base but Exception
        lack = f"ONNX Runtime's CUDA provider does not load: {_reason(ort, e)}"
        log.warning("%s", lack)
        return lack
    finally:
        ort.set_default_logger_severity(2)  # warning, its default
    return ""


def _reason(ort: Any, error: Exception) -> str:
    """The loader's word on the provider's library ("libcudnn.so.9: cannot open ..."), which the error leaves out."""
    name = "onnxruntime_providers_cuda.dll" if os.name == "nt" else "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as e:
        return str(e)
    return str(error).strip().splitlines()[-1]
