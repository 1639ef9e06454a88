"""Write a stage in OpenVINO's own form (IR): one XML file and one file of weights, made from its ONNX graph.

OpenVINO reads ONNX files too, but not ditc's functions, and reading an IR file takes a tenth of the time. The form is
neither for a certain CPU nor compiled: that happens where it is loaded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import onnx

from ditc.export.engine.graph_files import graph_size_bytes, inlined
from ditc.export.engine.memory import PeakMemory
from ditc.export.engine.run_time_scales import leave_tokens_to_library
from ditc.export.engine.unsigned_inputs import make_inputs_unsigned
from ditc.runtime.atomic import atomic_files
from ditc.runtime.errors import BuildError, MissingExtra, SessionError
from ditc.runtime.sessions.openvino import reason, weights_path
from ditc.runtime.sessions.openvino_library import TYPES, core, load_openvino
from ditc.runtime.sessions.registry import missing, row_of
from ditc.runtime.spec import Backend, Precision, StageSpec
from ditc.runtime.weight_map import LORA_DOWN, LORA_UP

HINT = "run the stage with --backend onnxruntime: if that works, the graph is sound and OpenVINO has a limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class IrReport:
    """The written files, and what it took.

    Attributes:
        peak_memory_bytes: the largest resident size of the whole process.
    """

    model: Path
    weights: Path
    seconds: float
    peak_memory_bytes: int


def check_openvino() -> None:
    """Refuse a build before it begins if OpenVINO is not installed, or too old.

    Raises:
        MissingExtra: it is not installed. SessionError: it is too old.
    """
    row = row_of(Backend.OPENVINO)
    lack = missing(row.name)
    if "not installed" in lack:
        raise MissingExtra(row.packages[0], row.extra or "")
    if lack:
        raise SessionError(lack, hint=f"{row.install} --upgrade")


def estimate_memory_bytes(onnx_path: Path) -> int:
    """Estimate how many bytes `write_ir` takes on top of what the process holds: the weights are read and written."""
    return 2 * graph_size_bytes(onnx_path)


def write_ir(
    onnx_path: Path, out: Path, *, spec: StageSpec, precision: Precision = Precision.FP32
) -> IrReport:
    """Write the graph as `out`, an .xml file, and its weights beside it.

    Element types stay as they are in the graph, but for the 8-bit inputs of GEMMs, which become unsigned.

    Args:
        precision: that of the graph. OpenVINO itself quantizes the tokens of an int8-dynamic one.

    Raises:
        BuildError: OpenVINO cannot convert the graph, or gives it other inputs or outputs than the spec.
        OutputError: the files cannot be written.
    """
    begin, openvino = time.monotonic(), load_openvino()
    quantized = leave_tokens_to_library if precision is Precision.INT8_DYNAMIC else make_inputs_unsigned

    def change(graph: onnx.ModelProto) -> int:
        return quantized(graph) + _require_lora_inputs(graph)

    out.parent.mkdir(parents=True, exist_ok=True)
    with PeakMemory() as memory, inlined(onnx_path, change) as graph:
        try:
            model = core().read_model(str(graph))
        except Exception as e:  # its frontends raise classes of their own
            raise BuildError(
                f"{spec.name}: OpenVINO {openvino.__version__} cannot read {onnx_path}: {reason(e)}",
                hint=HINT,
            ) from e
        _check_types(model, spec, onnx_path)
        with atomic_files(weights_path(out), out) as folder:
            openvino.save_model(model, str(folder / out.name), compress_to_fp16=False)
        del model
    return IrReport(
        model=out,
        weights=weights_path(out),
        seconds=time.monotonic() - begin,
        peak_memory_bytes=memory.peak_bytes,
    )


def _require_lora_inputs(graph: onnx.ModelProto) -> int:
    """Remove the default values of inputs for LoRAs. OpenVINO would make constants of them, and no inputs (2026.4)."""
    inputs = {value.name for value in graph.graph.input}
    defaults = [value for value in graph.graph.initializer if value.name in inputs]
    for value in defaults:
        graph.graph.initializer.remove(value)
    return len(defaults)


def _check_types(model: object, spec: StageSpec, onnx_path: Path) -> None:
    ports = (*model.inputs, *model.outputs)  # type: ignore[attr-defined]
    found = {port.get_any_name(): port.get_element_type().get_type_name() for port in ports}
    found = {name: kind for name, kind in found.items() if not name.endswith((LORA_DOWN, LORA_UP))}
    wanted = {tensor.name: TYPES[tensor.dtype] for tensor in (*spec.inputs, *spec.outputs)}
    if found != wanted:
        raise BuildError(
            f"{spec.name}: OpenVINO reads {onnx_path} with {found}, but the stage's spec has {wanted}",
            hint=HINT,
        )
