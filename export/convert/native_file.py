"""Read a network's weights from one file, as training code saves them: .safetensors, or .pth without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ditc.export.checkpoint.file_content import check_content
from ditc.export.checkpoint.plain_weights import plain_weights
from ditc.export.checkpoint.tensors import TensorEntry, TensorSource, read_safetensors
from ditc.runtime.errors import CheckpointError

# .bin is FSDP's: accelerate's save_state writes pytorch_model_fsdp.bin.
TORCH_SUFFIXES = frozenset({".pth", ".pt", ".ckpt", ".bin"})
STATE_DICT, AVERAGED = "state_dict", "state_dict_ema"
SHARD_SUFFIX = ".distcp"  # torch.distributed.checkpoint
SHOWN = 4


class NumpyValue:
    """Stands for a numpy array or scalar in a torch file. Its values are not kept, and numpy is not called."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# How pickles name numpy's arrays and scalars, in numpy 1 and 2. NVlabs' trainers save the state of numpy's random
# generator beside the weights (NVlabs/Sana, diffusion/utils/checkpoint.py), and schedulers save scalars.
NUMPY_NAMES = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


def read_native(path: Path, *, ema: bool = False) -> TensorSource:
    """Open the tensors of a single file, by their native names.

    Args:
        path: a .safetensors file, or a torch file that holds {"state_dict": ...} or the state dict itself.
        ema: take "state_dict_ema", the averaged weights of a training file, instead of "state_dict".

    Raises:
        CheckpointError: the file is missing or damaged, has another format, holds more than tensors and plain data,
            holds weights in a form that ditc does not read, or has no averaged weights although `ema` asks for them.
    """
    if path.is_dir():
        raise _directory(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", hint="check the path")
    check_content(path, torch_is_right=path.suffix in TORCH_SUFFIXES)
    if path.suffix == ".safetensors":
        if ema:
            raise CheckpointError(
                f"{path} holds one set of weights, so --ema has nothing to choose",
                hint="leave --ema out, or give the training file, which holds both",
            )
        return plain_weights(path, read_safetensors(path))
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{path} does not end in .safetensors or in one of {', '.join(sorted(TORCH_SUFFIXES))}",
            hint="rename the file to the name under which it was released",
        )
    tensors = _state_dict(path, _load(path), ema)
    return plain_weights(path, {name: _entry(tensor) for name, tensor in tensors.items()})


def _directory(path: Path) -> CheckpointError:
    """The error for a directory, which says which of its files can be converted."""
    if any(path.rglob(f"*{SHARD_SUFFIX}")):
        return CheckpointError(
            f"{path} holds shards of torch.distributed ({SHARD_SUFFIX}), which only torch can put together",
            hint="merge them where the model was trained: accelerate merge-weights SHARDS OUT; then convert OUT's file",
        )
    files = sorted(file for suffix in TORCH_SUFFIXES for file in path.rglob(f"pytorch_model*{suffix}"))
    if files and not (path / "model_index.json").is_file():
        return CheckpointError(
            f"{path} is a directory, but a native checkpoint is one file", hint=f"give its file {files[0]}"
        )
    return CheckpointError(
        f"{path} is a directory, but a native checkpoint is one file",
        hint="to convert a diffusers directory to a native file, add --to-native",
    )


def _load(path: Path) -> Any:
    """Load with torch's restricted unpickler (weights_only), which builds tensors and containers and runs no code."""
    try:
        with torch.serialization.safe_globals([(NumpyValue, name) for name in NUMPY_NAMES]):
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
    key = AVERAGED if ema else STATE_DICT
    if isinstance(value, dict):
        _check_keys(path, value, key)
        value = value.get(key, value)
    if not isinstance(value, dict) or not value:
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}, not a state dict",
            hint="the file must hold a state dict, or one under the key 'state_dict'",
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = "numpy value" if isinstance(tensor, NumpyValue) else type(tensor).__name__
            raise CheckpointError(
                f"{path}: {name!r} is a {kind}, not a tensor",
                hint="the file must hold a state dict, or one under the key 'state_dict'",
            )
    return value


def _check_keys(path: Path, value: dict[Any, Any], key: str) -> None:
    """Refuse a file whose weights are under another key than the one asked for, and say where they are."""
    if key in value or (key == STATE_DICT and any(isinstance(item, torch.Tensor) for item in value.values())):
        return
    found = [str(name) for name, item in value.items() if _holds_tensors(item)]
    if key == AVERAGED:
        raise CheckpointError(
            f"{path} has no {AVERAGED}, only {', '.join(map(str, [*value][:SHOWN]))}", hint="leave --ema out"
        )
    if AVERAGED in found:
        raise CheckpointError(
            f"{path} has only averaged weights, {AVERAGED}, and no {STATE_DICT}",
            hint="add --ema to convert these",
        )
    if found:
        raise CheckpointError(
            f"{path} has no {STATE_DICT}; its tensors are under {', '.join(found)}",
            hint="save the one to convert by itself: "
            f"torch.save({{'state_dict': torch.load(FILE)[{found[0]!r}]}}, NEW)",
        )


def _holds_tensors(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )


def _entry(tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _reason(error: Exception) -> str:
    """The line of torch's message that says what it refused; the rest tells how to switch the protection off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "WeightsUnpickler error" in line or "Unsupported" in line]
    return (telling or lines or [type(error).__name__])[0]
