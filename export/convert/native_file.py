"""Read a network's weights from one file, as training code saves them: .safetensors, or .pth without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ditc.export.checkpoint.tensors import TensorEntry, TensorSource, read_safetensors
from ditc.runtime.errors import CheckpointError

TORCH_SUFFIXES = frozenset({".pth", ".pt", ".ckpt"})


def read_native(path: Path, *, ema: bool = False) -> TensorSource:
    """Open the tensors of a single file, by their native names.

    Args:
        path: a .safetensors file, or a torch file that holds {"state_dict": ...} or the state dict itself.
        ema: take "state_dict_ema", the averaged weights of a training file, instead of "state_dict".

    Raises:
        CheckpointError: the file is missing or damaged, has another format, holds more than tensors and plain data,
            or has no averaged weights although `ema` asks for them.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a directory, but a native checkpoint is one file",
            hint="to convert a diffusers directory to a native file, add --to-native",
        )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", hint="check the path")
    if path.suffix == ".safetensors":
        return TensorSource(read_safetensors(path))
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{path} does not end in .safetensors or in one of {', '.join(sorted(TORCH_SUFFIXES))}",
            hint="rename the file to the name under which it was released",
        )
    tensors = _state_dict(path, _load(path), ema)
    return TensorSource({name: _entry(tensor) for name, tensor in tensors.items()})


def _load(path: Path) -> Any:
    """Load with torch's restricted unpickler (weights_only), which builds tensors and containers and runs no code."""
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # a file of torch before 1.6
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than plain tensors: {_reason(error)}",
            hint="where the model was trained, save only {'state_dict': model.state_dict()}, or safetensors",
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole torch file ({path.stat().st_size} bytes): {_reason(error)}",
            hint="fetch the file again",
        ) from error


def _state_dict(path: Path, value: Any, ema: bool) -> dict[str, torch.Tensor]:
    key = "state_dict_ema" if ema else "state_dict"
    if isinstance(value, dict) and (ema or key in value):
        if key not in value:
            raise CheckpointError(
                f"{path} has no {key}, only {', '.join(map(str, value))}", hint="leave --ema out"
            )
        value = value[key]
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a state dict")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor",
                hint="the file must hold a state dict, or one under the key 'state_dict'",
            )
    return value


def _entry(tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _reason(error: Exception) -> str:
    """The line of torch's message that says what it refused; the rest tells how to switch the protection off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "WeightsUnpickler error" in line or "Unsupported" in line]
    return (telling or lines or [type(error).__name__])[0]
