"""Run a stage with PyTorch: parity's reference is the same pipeline over these sessions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ditc.runtime.session import Array, ComputeDevice, Tensor, to_numpy
from ditc.runtime.spec import DType, StageSpec

TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.INT64: torch.int64,
    DType.BOOL: torch.bool,
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let each computation of torch use one thread, for results that are written into a bundle.

    With several, the order of sums and so their last bits depend on how many the machine has.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchSession:
    """One stage as an eager module, whose forward takes and returns tensors in the order of the spec."""

    def __init__(self, module: nn.Module, spec: StageSpec, *, device: str = "cpu") -> None:
        self.spec = spec
        self.module = module.to(device).eval()
        self.device = compute_device(device)
        self._device = device

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Execute the stage once; host arrays in, host arrays out."""
        arguments = [self._to_torch(to_numpy(feeds[spec.name]), spec.dtype) for spec in self.spec.inputs]
        with torch.inference_mode():
            results = self.module(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        return {spec.name: from_torch(out) for spec, out in zip(self.spec.outputs, results, strict=True)}

    def close(self) -> None:
        """Do nothing: the module belongs to the caller."""

    def _to_torch(self, array: Array, dtype: DType) -> torch.Tensor:
        return to_torch(array, dtype).to(self._device)


def compute_device(device: str = "cpu") -> ComputeDevice:
    """The ComputeDevice of sessions that run on the PyTorch device of this name."""
    kind = torch.device(device).type
    return ComputeDevice(
        kind="cpu" if kind == "cpu" else "cuda" if kind == "cuda" else "other", name=f"PyTorch on {device}"
    )


def to_torch(array: Array, dtype: DType) -> torch.Tensor:
    """A host array as a tensor; a bf16 array holds its bits as uint16."""
    tensor = torch.from_numpy(
        np.require(array, requirements=("C", "W"))
    )  # torch warns about read-only memory
    return tensor.view(torch.bfloat16) if dtype is DType.BFLOAT16 else tensor


def from_torch(tensor: torch.Tensor) -> Array:
    """A tensor as a host array; a bf16 tensor becomes its bits as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    array: Array = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array
