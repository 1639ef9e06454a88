"""Whether ONNX Runtime's CUDA provider can run here. This is checked before a session is made.

If the provider cannot be loaded, ONNX Runtime itself only logs that and makes a session for the CPU. That session fails
later, at the first binding to the device, with "CUDA Provider not available".
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

from ditc.runtime.gpu import find_gpu, no_gpu

log = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
# The wheels onnxruntime and onnxruntime-gpu contain the same files, and ditc requires the former. An extra cannot
# replace it: pip would install both.
INSTALL = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "onnxruntime-gpu[cuda,cudnn]"'


@cache
def cuda_lack() -> str:
    """Why the CUDA provider cannot run here, in one line; "" if it can."""
    import numpy as np
    import onnxruntime as ort

    if CUDA not in ort.get_available_providers():
        return f"this ONNX Runtime has no CUDA provider: {', '.join(ort.get_available_providers())}"
    if find_gpu() is None:
        return no_gpu()
    # The loader does not search the folders where pip puts CUDA and cuDNN, so they are loaded beforehand. preload_dlls
    # prints what it does not find.
    with redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    ort.set_default_logger_severity(4)  # only fatal errors: the reason is logged below
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.float32, "cuda", 0)
    except Exception as e:  # onnxruntime raises classes of its C API that share no base but Exception
        lack = f"ONNX Runtime's CUDA provider does not load: {_reason(ort, e)}"
        log.warning("%s", lack)
        return lack
    finally:
        ort.set_default_logger_severity(2)  # warnings, the default
    return ""


def _reason(ort: Any, error: Exception) -> str:
    """What the system's loader says about the provider's library, such as "libcudnn.so.9: cannot open ...".

    ONNX Runtime's own error does not contain this.
    """
    name = "onnxruntime_providers_cuda.dll" if os.name == "nt" else "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as e:
        return str(e)
    return str(error).strip().splitlines()[-1]
