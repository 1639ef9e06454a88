"""Export one stage to an ONNX file: torch.export, ditc's passes, external weights, and a check at two sets of sizes."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ditc.export.build.weights import weights_of
from ditc.export.contract import StageModule
from ditc.export.example_inputs import example_feeds, example_sizes, shape_of
from ditc.export.graph import ops
from ditc.export.graph.passes import run_passes
from ditc.export.graph.passes.expand_repeats import expand_repeats
from ditc.export.graph.passes.islands import check_islands
from ditc.export.graph.passes.lora_inputs import add_lora_inputs
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.graph.torch_session import TorchSession, to_torch
from ditc.export.graph.trace_repeats import trace_blocks_once
from ditc.export.options import OPSETS
from ditc.export.quant.layers import quantizable_layers
from ditc.export.quant.plan import QuantPlan
from ditc.export.quant.verify import check_scales
from ditc.runtime.atomic import atomic_files
from ditc.runtime.errors import BuildError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.session import numpy_dtype
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import Precision, StageSpec
from ditc.runtime.weight_map import Weight

log = logging.getLogger(__name__)

SIXTEEN_BIT = (Precision.FP16, Precision.BF16)
# ONNX Runtime and PyTorch compute the same graph with different kernels, so a few hundred dependent GEMMs round
# differently in fp32. Measured 1e-7 to 4e-6.
FP32_RELATIVE_L2 = 2e-5
# ONNX Runtime's CPU provider computes fp16 graphs in fp32, while torch rounds after every operation. This bound
# finds wrong graphs, not rounding errors; parity judges those, through the round_to graph.
FP16_RELATIVE_L2 = 2e-2

# Cap on the parameters of a stage that is run in ONNX Runtime and in PyTorch after its export. At 1024 px, 0.6 G
# parameters in fp32 take minutes on two cores. fp16 has a lower cap: PyTorch has no fast fp16 GEMM on most CPUs, and
# ONNX Runtime's CPU provider holds fp16 weights in fp32.
MOST_CHECKED_PARAMETERS = {Precision.FP32: 1e9, Precision.TF32: 1e9, Precision.FP16: 1e8}
# Cap on a checked dimension, in multiples of its step. Much smaller sizes break the bounds above, which hold for usual
# sizes: 8 text tokens in fp16 give 3.5e-2.
MOST_CHECKED_STEPS = 64
# The cap for heights and widths, below their ranges too. An autoencoder's activations grow with the pixels: at 1024 px
# the check of a full-size DC-AE decoder took more memory than the rest of its build.
MOST_CHECKED_SIDE = 8

# The first opset whose Conv takes bf16 (ONNX, Operators.md). ONNX Runtime does not load such a graph in an older one.
BF16_OPSET = 22


@dataclass(frozen=True, slots=True)
class OnnxFiles:
    """A written graph, the file of its weights, and where each tensor of the checkpoint is in it."""

    model: Path
    weights: Path
    weight_map: tuple[Weight, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that exist: a small graph holds its weights itself."""
        return (self.model, self.weights) if self.weights.exists() else (self.model,)


def data_path(graph: Path) -> Path:
    """The path of the file with a graph's weights."""
    return graph.with_name(graph.name + ".data")


def to_onnx(
    stage: StageModule,
    path: Path,
    *,
    check: bool = True,
    quantize: QuantPlan | None = None,
    opset: int = OPSETS[0],
    lora_inputs: bool = False,
) -> OnnxFiles:
    """Export the stage to `path` and its weights to `path`.data.

    Existing files are replaced only when the new ones are complete and checked.

    Args:
        check: compare the graph with PyTorch, if the stage is small enough for a CPU.
        quantize: the plan to write into the graph, after the unquantized graph has passed its check.
        opset: one of OPSETS; a bf16 stage takes at least BF16_OPSET.
        lora_inputs: whether the graph gets optional inputs for LoRAs; not for a graph that is quantized.

    Raises:
        BuildError: torch.export refuses the module or fixes a dynamic dimension, ONNX Runtime disagrees with PyTorch
            at one of two sets of sizes, or the graph breaks an fp32 island, its spec or the plan.
        OutputError: the files cannot be written.
    """
    model = to_model(stage, opset)
    if lora_inputs:
        add_lora_inputs(model, [source.parameter for source in stage.weights])
    final = OnnxFiles(path, data_path(path))
    # The graph names its weights file, so both have their final names in the temporary folder.
    with atomic_files(final.weights, final.model) as folder:
        written = OnnxFiles(folder / final.model.name, folder / final.weights.name)
        ir.save(model, written.model, external_data=written.weights.name)
        if check and can_check(stage):
            check_export(stage, written.model)
        elif check and stage.precision is not Precision.BF16:
            log.warning(
                "%s: this build does not compare the graph with PyTorch, because its %.1f G parameters in %s would "
                "take too long; `ditc parity` compares them",
                stage.spec.name,
                parameter_count(stage) / 1e9,
                stage.precision.value,
            )
        if quantize is not None:
            layers = quantizable_layers(stage)
            quantize_graph(model, quantize, {name: layer.parameter for name, layer in layers.items()})
            ir.save(model, written.model, external_data=written.weights.name)
            check_scales(ir.load(written.model), quantize.layers, layers)
        weight_map = weights_of(stage.weights, model)
        del model
    return replace(final, weight_map=weight_map)


def to_model(stage: StageModule, opset: int = OPSETS[0]) -> ir.Model:
    """The stage as an ONNX graph in memory, after all passes."""
    model = trace(stage, opset)
    with _quiet():
        run_passes(model, stage.spec)
    # Equal modules must give equal files. A stack trace holds paths of this machine and torch's running numbers; what
    # the graph keeps of the ExportedProgram is in the order of a set, which differs from process to process.
    for node in model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    for key in [key for key in model.graph.metadata_props if key.startswith("pkg.torch.export.")]:
        del model.graph.metadata_props[key]
    ops.add_functions(model)  # last, because the passes inline every function that they see
    if stage.precision in SIXTEEN_BIT:
        check_islands(model, stage.spec)
    return model


def trace(stage: StageModule, opset: int = OPSETS[0]) -> ir.Model:
    """The stage as torch.onnx.export leaves it, with repeated blocks put in place.

    No pass has run yet, and custom ops have no function bodies.
    """
    spec = stage.spec
    opset = max(opset, BF16_OPSET) if stage.precision is Precision.BF16 else opset
    sizes = example_sizes(spec)
    # torch.export reads shapes and types alone, and pages of zeros that nobody reads take no memory: 3.8 GB of what
    # AutoencoderKLWan keeps from chunk to chunk at 480x832 pixels.
    arguments = tuple(
        to_torch(np.zeros(shape_of(tensor, sizes), numpy_dtype(tensor.dtype)), tensor.dtype)
        for tensor in spec.inputs
    )
    with _quiet(), trace_blocks_once(stage.module):
        try:
            program = torch.onnx.export(
                stage.module.eval(),
                arguments,
                dynamo=True,
                opset_version=opset,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=_dynamic_shapes(stage),
                custom_translation_table=ops.onnx_translations(opset),
                optimize=False,  # ditc's passes do it, and keep the names of the weights
                verbose=False,
            )
        except Exception as e:  # torch.export raises many classes, and any of them means that it has failed
            raise BuildError(
                f"{spec.name}: torch.export failed: {_cause(e)}",
                hint="if you changed the network, keep its shapes symbolic: no Python int of a size, no branch on it",
            ) from e
    assert program is not None
    model: ir.Model = program.model
    expand_repeats(model, dict(stage.module.named_parameters()) | dict(stage.module.named_buffers()))
    return model


def can_check(stage: StageModule) -> bool:
    """Whether a CPU can run the graph and the module in reasonable time."""
    if stage.precision is Precision.BF16:
        return False  # ONNX Runtime's CPU provider has no bf16 arithmetic
    return parameter_count(stage) <= MOST_CHECKED_PARAMETERS[stage.precision]


def parameter_count(stage: StageModule) -> int:
    """The number of the stage's parameters."""
    return sum(parameter.numel() for parameter in stage.module.parameters())


def check_sizes(spec: StageSpec) -> list[dict[str, int]]:
    """The two sets of sizes that a finished graph is checked with."""
    return [
        example_sizes(spec, second=second, max_multiple=MOST_CHECKED_STEPS, max_side=MOST_CHECKED_SIDE)
        for second in (False, True)
    ]


def check_export(stage: StageModule, model: Path) -> float:
    """Run the written graph and the module at two sets of sizes, and compare their outputs.

    Returns:
        The largest relative L2 error of any output.

    Raises:
        BuildError: an error is above the bound. The message names stage, output, sizes and error.
    """
    bound = FP16_RELATIVE_L2 if stage.precision is Precision.FP16 else FP32_RELATIVE_L2
    reference = TorchSession(stage.module, stage.spec)
    candidate = OnnxRuntimeSession(model, stage.spec, provider=CPU)
    worst = 0.0
    for seed, sizes in enumerate(check_sizes(stage.spec), start=1):
        feeds = example_feeds(stage.spec, sizes, seed=seed, integers=stage.integers)
        expected, got = reference.run(feeds), candidate.run(feeds)
        for name in expected:
            error = relative_l2(np.asarray(got[name]), np.asarray(expected[name]))
            worst = max(worst, error)
            if not error <= bound:
                raise BuildError(
                    f"{stage.spec.name}: output {name} of the exported graph differs from PyTorch at {sizes}: "
                    f"relative L2 {error:.3g}, bound {bound:.1g}",
                    hint="compare module by module: ditc parity BUNDLE --against CHECKPOINT --level module",
                )
    candidate.close()
    log.debug("%s: exported graph equals PyTorch within %.2g", stage.spec.name, worst)
    return worst


def _dynamic_shapes(stage: StageModule) -> tuple[Any, ...]:
    """Named dimensions become symbols. Equal names share a symbol, so torch.export proves that they agree."""
    spec = stage.spec
    dims = {name: _dim(name, spec) for name in spec.profile}
    shapes = [
        {axis: dims[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    ]
    parameters = inspect.signature(stage.module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):  # torch.export sees *rest as one tuple
        named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        return (*shapes[:named], tuple(shapes[named:]))
    return tuple(shapes)


def _dim(name: str, spec: StageSpec) -> Any:
    """A symbol with a range that reaches beyond the profile's.

    The range must include the sizes that example_sizes gives, and torch.export takes no range of a single size.
    """
    step = spec.profile[name].multiple_of
    most = max(spec.profile[name].max // step, 3) + 1
    if step > 1:
        return step * torch.export.Dim(f"{name}_by_{step}", min=1, max=most)
    return torch.export.Dim(name, min=1, max=most)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.onnx, which warns about opset conversion and prints its progress."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The first line of the innermost error: torch wraps the reason in several pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
