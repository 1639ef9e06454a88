"""Give back the memory that an export leaves behind: mapped checkpoint files, and freed memory that malloc keeps."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from ditc.export.networks.loading import WeightSource

MAPS = Path("/proc/self/maps")
MADV_DONTNEED = 4  # Linux, asm-generic/mman-common.h
WORTHWHILE_BYTES = 2**20


def free_copies(module: nn.Module, sources: Iterable[WeightSource]) -> None:
    """Free the weights that loading has copied into another element type. The module cannot be used afterwards.

    Deleting the module is not enough, because torch 2.13 keeps the weights of an exported module alive. Weights in the
    checkpoint's own type are left alone: their memory may belong to the checkpoint.
    """
    state = module.state_dict()
    for source in sources:
        storage = state[source.parameter].untyped_storage()
        if source.dtype not in (None, state[source.parameter].dtype) and storage.resizable():
            storage.resize_(0)


def release_memory(files: Iterable[Path]) -> int:
    """Release the memory of every mapping of these files, and the freed memory that malloc keeps.

    Unreachable objects are collected first: exported modules are in reference cycles, which keep their weights.
    A tensor that is used later reads its bytes from the file again. So such a tensor must never have been written to,
    which TensorSource demands too. The release is needed because torch 2.13 keeps the weights of an exported module
    alive. It works on Linux; elsewhere it does nothing.

    Returns:
        The released address space in bytes.
    """
    gc.collect()
    paths = {str(path.resolve()) for path in files}
    dropped = sum(_drop(start, end) for start, end, path in _mappings() if path in paths)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc has it, musl does not
        libc.malloc_trim(0)
    return dropped


def release_pages(tensor: Tensor) -> None:
    """Release the memory of a tensor that is mapped from a file, once it has been copied; others stay as they are."""
    first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < WORTHWHILE_BYTES:
        return
    start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if any(low <= start and end <= high and path.startswith("/") for low, high, path in _mappings()):
        _drop(start, end)


def _mappings() -> Iterator[tuple[int, int, str]]:
    """Start, end and file of every mapping of this process; none where the system does not tell them."""
    for line in MAPS.read_text().splitlines() if MAPS.exists() else ():
        addresses, *_, path = [*line.split(maxsplit=5), ""][:6]
        start, end = (int(address, 16) for address in addresses.split("-"))
        yield start, end, path


def _drop(start: int, end: int) -> int:
    """Let the system take the pages back. They are read from the file again when they are used. Returns the bytes."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return end - start if libc.madvise(start, end - start, MADV_DONTNEED) == 0 else 0
