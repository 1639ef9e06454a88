"""What CUDA itself says about GPUs: the driver's own functions, through ctypes, without any package.

nvidia-smi may be missing, as in many containers, and numbers GPUs by their slots. CUDA's first GPU is the fastest one,
unless CUDA_DEVICE_ORDER=PCI_BUS_ID (CUDA programming guide, "CUDA Environment Variables").
"""

from __future__ import annotations

import ctypes
import os
import sys
import uuid
from dataclasses import dataclass
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"
# Values of CUdevice_attribute: compute capability, major and minor.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaGpu:
    """A GPU that CUDA sees. Its number is its place in `CudaAnswer.gpus`."""

    name: str
    sm: str
    uuid: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaAnswer:
    """What the driver answers.

    Attributes:
        gpus: in CUDA's order. Of an environment variable that hides GPUs, CUDA sees the others only.
        lack: why there is no GPU, in a few words; "" if there is one.
        version: the newest version of CUDA that the driver supports, such as "13.0"; "" without a driver.
    """

    gpus: tuple[CudaGpu, ...] = ()
    lack: str = ""
    version: str = ""


def ask(library: Any = None) -> CudaAnswer:
    """Ask the driver. From then on, this process keeps to the GPUs that it sees now, and forked children can use none.

    Args:
        library: an object with the driver's functions. None opens the driver.
    """
    if library is None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            return CudaAnswer(lack=f"{LIBRARY}, the driver's library, cannot be opened")
    hidden = f", with {VISIBLE}={os.environ[VISIBLE]!r}" if VISIBLE in os.environ else ""
    if code := library.cuInit(0):
        return CudaAnswer(lack=f"cuInit: {_error(library, code)}{hidden}")
    version = _integer(library.cuDriverGetVersion)
    gpus = tuple(_gpu(library, number) for number in range(_integer(library.cuDeviceGetCount)))
    return CudaAnswer(
        gpus=gpus,
        lack="" if gpus else f"CUDA sees none{hidden}",
        version=f"{version // 1000}.{version % 1000 // 10}",
    )


def _gpu(library: Any, number: int) -> CudaGpu:
    device = _integer(library.cuDeviceGet, number)
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, len(name), device)
    text = name.value.decode(errors="replace")
    identity = ctypes.create_string_buffer(16)
    # The second version, of CUDA 11.4, tells the instances of a divided GPU (MIG) apart.
    read_uuid = getattr(library, "cuDeviceGetUuid_v2", None) or library.cuDeviceGetUuid
    read_uuid(identity, device)
    memory = ctypes.c_size_t()
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor = (_integer(library.cuDeviceGetAttribute, which, device) for which in (_MAJOR, _MINOR))
    kind = "MIG" if " MIG " in text else "GPU"
    return CudaGpu(
        name=text,
        sm=f"sm{major}{minor}",
        uuid=f"{kind}-{uuid.UUID(bytes=identity.raw)}",
        memory_bytes=memory.value,
    )


def _integer(function: Any, *arguments: int) -> int:
    """The result of a function that writes one int. Zero if it fails."""
    value = ctypes.c_int()
    function(ctypes.byref(value), *arguments)
    return value.value


def _error(library: Any, code: int) -> str:
    """The driver's name of an error, such as CUDA_ERROR_NO_DEVICE."""
    name = ctypes.c_char_p()
    library.cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"CUDA error {code}"
