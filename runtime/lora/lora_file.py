"""Reads a LoRA from a safetensors file: pairs of matrices under the names of their modules.

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight              A: .lora_A, .lora_down, .lora.down
    transformer.transformer_blocks.0.attn1.to_q.lora_B.weight              B: .lora_B, .lora_up, .lora.up
    transformer.transformer_blocks.0.attn1.to_q.alpha                      optional
    transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector      optional, for DoRA

names.py says which weights the modules' names mean. Where a file has no alpha, neither under a key nor in its metadata,
alpha is the rank, as in `get_peft_kwargs` of diffusers 0.42.1. Names that begin with PEFT_PREFIX are peft's own, and
their settings are in CONFIG beside the file.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditc.runtime.bundle.safetensors import parse_safetensors
from ditc.runtime.errors import UsageError
from ditc.runtime.lora.lora import LoraLayer
from ditc.runtime.lora.metadata import Scalings, read_config, read_scalings
from ditc.runtime.session import Array

# Rank 256 of every layer of a network with 8 billion weights has about 2.5 GB in fp32.
MAX_BYTES = 4 * 2**30
# The largest rank that is applied. LoRAs are small; a file with a larger rank could only make the products slow.
MAX_RANK = 4096

DOWN, UP, ALPHA, MAGNITUDE = "down", "up", "alpha", "magnitude"
# What a name ends with: peft's, diffusers' older ones, and kohya's endings on diffusers' names.
ENDINGS = {
    DOWN: (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"),
    UP: (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"),
    ALPHA: (".alpha",),
    MAGNITUDE: (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
}
# What names begin with where peft has saved the file, and the file beside it that then holds alpha (`save_pretrained`,
# peft 0.21.2).
PEFT_PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20
# Kinds of keys that are known and not applied, with the reason.
REFUSED = (
    (r"\.lora_[AB]\.bias$", "a LoRA's own biases are not applied: train without lora_bias"),
    (
        r"\.diff(_b)?$|\.(weight|bias)$",
        "the key is a whole tensor, not a LoRA's: only pairs of matrices are applied",
    ),
    (r"\.lora_embedding_[AB]", "LoRAs of embeddings are not applied"),
    (r"\.dora_scale$", "this form of DoRA is not peft's, and diffusers does not apply it either"),
    (
        r"hada_|lokr_|\.oft_|\.boft_|\.on_input$|\.lora_mid\.",
        "only plain LoRAs and DoRAs are applied, no LyCORIS",
    ),
)
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
AS_DIFFUSERS_SAVES = "give a LoRA as pipe.save_lora_weights() of diffusers writes it"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """What a file holds, before it is known which weights its names mean.

    Attributes:
        name: the file's name.
        sha256: the hash of the file, and of the settings beside it where they count.
        layers: the changes, by the module's name in the file.
    """

    name: str
    sha256: str
    layers: Mapping[str, LoraLayer]


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that decide what `read_lora` reads: the LoRA, and peft's settings if they lie beside it."""
    config = path.with_name(CONFIG)
    return (path, config) if config.is_file() else (path,)


def read_lora(path: Path) -> LoraFile:
    """Read the whole file, and check it without a network.

    Raises:
        UsageError: it is missing, too large or not safetensors; a key belongs to no LoRA; a half of a pair is missing;
            the ranks of a pair differ, or are 0; a value is NaN or Inf; or peft's settings are missing or say that
            something else than a LoRA was trained. The message names the key.
    """
    data = _bytes_of(path, MAX_BYTES)
    try:
        tensors, metadata = parse_safetensors(data)
    except ValueError as e:
        hint = (
            "only safetensors are read: pickles can run code"
            if path.suffix in PICKLES
            else AS_DIFFUSERS_SAVES
        )
        raise UsageError(f"{path} is not a safetensors file: {e}", hint=hint) from e
    if not tensors:
        raise UsageError(f"{path} holds no tensors", hint=AS_DIFFUSERS_SAVES)
    modules = _modules(path, tensors)
    own = [module for module in modules if module.startswith(PEFT_PREFIX)]
    if own and len(own) < len(modules):
        other = next(module for module in modules if module not in own)
        raise UsageError(
            f"{path.name} holds {own[0]} and {other}: only one of the names begins with {PEFT_PREFIX}",
            hint="two files are mixed in it",
        )
    digest = hashlib.sha256(data)
    if own:
        content = _config_of(path, own[0])
        digest.update(content)
        scalings = read_config(f"{path.name}, {CONFIG}", PEFT_PREFIX, content)
    else:
        scalings = read_scalings(path.name, metadata, modules)
    layers = {module: _layer(path, module, parts, scalings) for module, parts in modules.items()}
    return LoraFile(name=path.name, sha256=digest.hexdigest(), layers=layers)


def check_readable(path: Path) -> None:
    """Raise UsageError if the file cannot be opened. It costs nothing, so it comes before a bundle is loaded."""
    with _named(path), path.open("rb"):
        pass


def _bytes_of(path: Path, most: int) -> bytes:
    with _named(path):
        size = path.stat().st_size
        if size > most:
            raise UsageError(
                f"the LoRA {path} has {size} bytes, and at most {most} are read",
                hint="is it a whole checkpoint? A LoRA holds only small matrices",
            )
        return path.read_bytes()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the LoRA in what the operating system says."""
    try:
        yield
    except (OSError, ValueError) as e:
        why, hint = getattr(e, "strerror", None) or e, "give the path of a .safetensors file"
        file, _, scale = str(path).rpartition(":")
        if file and Path(file).is_file():
            hint = f"{file} is there, but {scale!r} is not a number: write a scale as in {file}:0.8"
        raise UsageError(f"the LoRA {path} cannot be read: {why}", hint=hint) from e


def _config_of(path: Path, module: str) -> bytes:
    """The content of peft's settings beside the file, without which alpha is not known."""
    config = path.with_name(CONFIG)
    if not config.is_file():
        raise UsageError(
            f"{path.name} holds {module}, whose alpha is in {CONFIG}, and there is no such file beside it",
            hint="peft's save_pretrained() writes both: put them into one folder",
        )
    return _bytes_of(config, MAX_CONFIG_BYTES)


def _modules(path: Path, tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """The parts of each module's change, by the module's name."""
    modules: dict[str, dict[str, Array]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, kind = _parsed(path, key)
        if kind in modules[module]:
            raise UsageError(
                f"{path.name} has the part {kind} of {module} twice, as {key} too",
                hint="two files are mixed in it",
            )
        modules[module][kind] = tensor
    return modules


def _parsed(path: Path, key: str) -> tuple[str, str]:
    """The module that a key belongs to, and which part of its change the tensor is."""
    for kind, endings in ENDINGS.items():
        for ending in endings:
            module = key.removesuffix(ending)
            if module and module != key:
                return module, kind
    why = next((why for pattern, why in REFUSED if re.search(pattern, key)), AS_DIFFUSERS_SAVES)
    raise UsageError(f"{path.name} holds {key:.200}, which is not applied", hint=why)


def _layer(path: Path, module: str, parts: Mapping[str, Array], scalings: Scalings) -> LoraLayer:
    for kind in (DOWN, UP):
        if kind not in parts:
            matrix = "lora_A" if kind == DOWN else "lora_B"
            raise UsageError(
                f"{path.name} has no {matrix} for {module}, only {', '.join(sorted(parts))}",
                hint="the file is incomplete: save or fetch it again",
            )
    down, up = parts[DOWN], parts[UP]
    shapes = f"{module} has lora_A of shape {down.shape} and lora_B of shape {up.shape}"
    if down.ndim not in (2, 4) or up.ndim != down.ndim or (up.ndim == 4 and up.shape[2:] != (1, 1)):
        raise UsageError(f"{path.name}: {shapes}", hint="only linear layers and 2D convolutions have LoRAs")
    rank = down.shape[0]
    if not 0 < rank <= MAX_RANK or min(down.size, up.size) == 0:
        raise UsageError(
            f"{path.name}: {shapes}: the rank is {rank}", hint=f"a rank is between 1 and {MAX_RANK}"
        )
    if up.shape[1] != rank:
        grouped = (
            " LoRAs of convolutions in groups (depthwise) cannot be merged in peft either."
            if up.ndim == 4
            else ""
        )
        raise UsageError(
            f"{path.name}: {shapes}, so their ranks differ", hint=f"the two are not a pair.{grouped}"
        )
    values = {kind: _floats(path, module, kind, tensor) for kind, tensor in parts.items()}
    magnitude = values.get(MAGNITUDE)
    if magnitude is not None and magnitude.size != up.shape[0]:
        raise UsageError(
            f"{path.name}: {module} has a magnitude of shape {magnitude.shape} for {up.shape[0]} output channels",
            hint="the file is damaged, or of another network",
        )
    return LoraLayer(
        key=module,
        down=values[DOWN],
        up=values[UP],
        scaling=scalings.of(module, rank, _alpha(path, module, values)),
        magnitude=None if magnitude is None else magnitude.reshape(-1),
    )


def _alpha(path: Path, module: str, values: Mapping[str, Array]) -> float | None:
    if ALPHA not in values:
        return None
    if values[ALPHA].size != 1:
        raise UsageError(
            f"{path.name}: the alpha of {module} has shape {values[ALPHA].shape}", hint="alpha is one number"
        )
    return float(values[ALPHA].reshape(()))


def _floats(path: Path, module: str, kind: str, tensor: Array) -> Array:
    """The values in fp32. The reader gives bf16 as the bits of its numbers."""
    if tensor.dtype == np.uint16:
        tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
    elif tensor.dtype.kind != "f" and not (kind == ALPHA and tensor.dtype == np.int64):
        raise UsageError(
            f"{path.name}: the part {kind} of {module} has the element type {tensor.dtype}",
            hint="LoRAs are read in fp32, fp16 and bf16",
        )
    floats: Array = np.ascontiguousarray(tensor, np.float32)
    bad = floats.size - int(np.isfinite(floats).sum())
    if bad:
        raise UsageError(
            f"{path.name}: the part {kind} of {module} has {bad} of {floats.size} values that are NaN or Inf",
            hint="the file is damaged or its training diverged",
        )
    return floats
