"""config.pbtxt of a model, as protobuf text (ModelConfig in Triton's model_config.proto).

A dimension that is dynamic is -1. The range that a stage was built for is a comment beside it, because Triton has no
field for it; an engine refuses other sizes itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ditc.runtime.errors import UsageError
from ditc.runtime.sessions.registry import TritonForm
from ditc.runtime.spec import DType, StageSpec, TensorSpec

TYPES = {
    DType.FLOAT32: "TYPE_FP32",
    DType.FLOAT16: "TYPE_FP16",
    DType.INT64: "TYPE_INT64",
    DType.BOOL: "TYPE_BOOL",
}


@dataclass(frozen=True, slots=True)
class Word:
    """A name of an enum, or true and false, which stand without quotes."""

    text: str


@dataclass(frozen=True, slots=True)
class Noted:
    """A value with a comment behind it."""

    value: Value
    note: str


Value = str | int | Word | Noted | Mapping[str, "Value"] | Sequence["Value"]


def stage_config(
    name: str, spec: StageSpec, form: TritonForm, version: int, *, instances: int, kind: str, threads: int
) -> str:
    """The configuration of a stage.

    A stage whose tensors all have the same first dimension is batched by Triton. The denoiser, whose samples and rows
    are counted apart, is batched by the pipeline.

    Args:
        form: how Triton opens the stage.
        version: the only version that Triton serves.
        kind: where the instances run, if the form leaves the choice: AUTO, CPU or GPU.
        threads: per instance, if the form has a parameter for it; 0 leaves it to the library.

    Raises:
        UsageError: Triton, or its Python backend, cannot hold one of the tensors.
    """
    batch = _batch_dimension(spec)
    content: dict[str, Value] = {
        "name": name,
        "backend": form.backend,
        "max_batch_size": spec.profile[batch].max if batch else 0,
        "input": [_tensor(tensor, spec, batch) for tensor in spec.inputs],
        "output": [_tensor(tensor, spec, batch) for tensor in spec.outputs],
        **serving(version, instances=instances, kind=form.kind or kind, batched=bool(batch)),
    }
    if threads and form.threads:
        content["parameters"] = parameters({form.threads: str(threads)})
    return as_text(content)


def serving(version: int, *, instances: int, kind: str, batched: bool) -> dict[str, Value]:
    """The parts that all models have: version, instances, batching across requests."""
    return {
        **({"dynamic_batching": {}} if batched else {}),
        "version_policy": {"specific": {"versions": [version]}},
        "instance_group": [{"count": instances, "kind": Word(f"KIND_{kind}")}],
    }


def parameters(values: Mapping[str, str]) -> list[Value]:
    """The field `parameters`, which is a map."""
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def as_text(message: Mapping[str, Value]) -> str:
    """A message as protobuf text, one field per line."""
    return "".join(_lines(message, ""))


def _lines(message: Mapping[str, Value], indent: str) -> list[str]:
    lines = list[str]()
    for name, value in message.items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        for each in cast("Sequence[Value]", value) if several else [value]:
            one, note = (each.value, f"  # {each.note}") if isinstance(each, Noted) else (each, "")
            if isinstance(one, Mapping):
                lines += [f"{indent}{name} {{\n", *_lines(one, f"{indent}  "), f"{indent}}}\n"]
            else:
                assert isinstance(one, str | int | Word)
                text = one.text if isinstance(one, Word) else json.dumps(one)
                lines.append(f"{indent}{name}: {text}{note}\n")
    return lines


def _batch_dimension(spec: StageSpec) -> str:
    """The name of the first dimension if all tensors share it; "" otherwise."""
    first = {tensor.shape[0] if tensor.shape else "" for tensor in (*spec.inputs, *spec.outputs)}
    name = first.pop()
    return name if not first and isinstance(name, str) and name in spec.profile else ""


def _tensor(tensor: TensorSpec, spec: StageSpec, batch: str) -> Value:
    if tensor.dtype not in TYPES:
        raise UsageError(
            f"{spec.name}: {tensor.name} is {tensor.dtype.value}, which Triton's Python backend cannot hold",
            hint="export another precision: --precision fp16 or fp32",
        )
    dims: list[Value] = []
    for dim in tensor.shape[1:] if batch else tensor.shape:
        if isinstance(dim, int):
            dims.append(dim)
            continue
        known = spec.profile.get(dim)
        steps = f", in steps of {known.multiple_of}" if known is not None and known.multiple_of > 1 else ""
        dims.append(Noted(-1, dim if known is None else f"{dim}: {known.min} to {known.max}{steps}"))
    return {"name": tensor.name, "data_type": Word(TYPES[tensor.dtype]), "dims": dims}
