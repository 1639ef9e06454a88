"""One stage to one ONNX file: torch.export, our passes, external weights, and a second run at another shape."""

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
from ditc.export.example_inputs import example_feeds, example_sizes
from ditc.export.graph import ops
from ditc.export.graph.passes import run_passes
from ditc.export.graph.passes.expand_repeats import stamp
from ditc.export.graph.passes.islands import check_islands
from ditc.export.graph.passes.qdq import quantize_graph
from ditc.export.graph.torch_session import TorchSession, to_torch
from ditc.export.graph.trace_repeats import traced_once
from ditc.export.options import OPSETS
from ditc.export.quant.layers import linear_layers
from ditc.export.quant.plan import QuantPlan
from ditc.export.quant.verify import check_scales
from ditc.runtime.atomic import atomic_files
from ditc.runtime.errors import BuildError
from ditc.runtime.metrics import relative_l2
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import Precision, StageSpec
from ditc.runtime.weight_map import Weight

log = logging.getLogger(__name__)

SIXTEEN_BIT = (Precision.FP16, Precision.BF16)
# Same graph, other kernels: fp32 rounding of a few hundred dependent GEMMs. Measured 1e-7 to 4e-6.
FP32_RELATIVE_L2 = 2e-5
# ONNX Runtime's CPU provider widens fp16 to fp32, torch rounds after every op: this finds wrong graphs, not
# rounding (rounding is parity's matter, through the round_to graph).
FP16_RELATIVE_L2 = 2e-2

# Of a stage that is run in ONNX Runtime and in PyTorch after its export. At 1024 px, 0.6 G in fp32 are minutes on two
# cores; PyTorch has no fast fp16 GEMM on most CPUs, and ONNX Runtime holds fp16 weights in fp32 there.
MOST_CHECKED_PARAMETERS = {Precision.FP32: 1e9, Precision.TF32: 1e9, Precision.FP16: 1e8}
# And at how many times what a size is a multiple of: for 4096 px the demo's denoiser takes 11 GB and minutes. No less,
# for the bounds above are of likely sizes (8 tokens of text in fp16: 3.5e-2).
CHECKED_SIZE = 64

# The first whose Conv takes bf16 (ONNX, Operators.md); ONNX Runtime refuses to load such a graph in an older one.
BF16_OPSET = 22


@dataclass(frozen=True, slots=True)
class OnnxFiles:
    """A written graph, its external weights, and where in it each tensor of the checkpoint lies."""

    model: Path
    weights: Path
    weight_map: tuple[Weight, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.model, self.weights) if self.weights.exists() else (self.model,)


def to_onnx(
    stage: StageModule,
    path: Path,
    *,
    check: bool = True,
    quantize: QuantPlan | None = None,
    opset: int = OPSETS[0],
) -> OnnxFiles:
    """Export the stage to `path` (weights to `path`.data), replacing both only when complete and checked.

    Args:
        quantize: applied to the graph once the unquantized one has passed its check.
        opset: one of OPSETS.

    Raises:
        BuildError: torch.export refuses the module, a dynamic dimension was specialised, or ONNX Runtime
            disagrees with PyTorch at either of two shapes.
        OutputError: the files cannot be written.
    """
    model = to_model(stage, opset)
    final = OnnxFiles(path, path.with_name(path.name + ".data"))
    # The graph names its weights file, so both have their final names in the temporary folder.
    with atomic_files(final.weights, final.model) as folder:
        written = OnnxFiles(folder / final.model.name, folder / final.weights.name)
        ir.save(model, written.model, external_data=written.weights.name)
        if check and _can_check(stage):
            check_export(stage, written.model)
        if quantize is not None:
            layers = linear_layers(stage)
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
    for node in model.graph.all_nodes():
        # Paths of the building machine, and torch's running numbers: equal modules must give equal files.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    ops.add_functions(model)  # last: the passes inline every function that they see
    if stage.precision in SIXTEEN_BIT:
        check_islands(model, stage.spec)
    return model


def trace(stage: StageModule, opset: int = OPSETS[0]) -> ir.Model:
    """The stage as torch.onnx.export leaves it: no pass has run, and custom ops have no bodies."""
    spec = stage.spec
    opset = max(opset, BF16_OPSET) if stage.precision is Precision.BF16 else opset
    feeds = example_feeds(spec, example_sizes(spec), integers=stage.integers)
    arguments = tuple(to_torch(feeds[tensor.name], tensor.dtype) for tensor in spec.inputs)
    with _quiet(), traced_once(stage.module):
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
                optimize=False,  # our passes do it, and keep the names of the weights
                verbose=False,
            )
        except (
            Exception
        ) as e:  # torch.export raises many classes; each means that this module cannot be built
            raise BuildError(
                f"{spec.name}: torch.export failed: {_cause(e)}",
                hint="the networks in export/networks/ export; one that was changed must keep shapes symbolic",
            ) from e
    assert program is not None
    model: ir.Model = program.model
    stamp(model, dict(stage.module.named_parameters()) | dict(stage.module.named_buffers()))
    return model


def _can_check(stage: StageModule) -> bool:
    """Whether a CPU can run the graph and the module in reasonable time."""
    if stage.precision is Precision.BF16:
        return False  # ONNX Runtime's CPU provider has no bf16
    count = sum(parameter.numel() for parameter in stage.module.parameters())
    if count <= MOST_CHECKED_PARAMETERS[stage.precision]:
        return True
    log.warning(
        "%s: %.1f G parameters in %s are not run against PyTorch in this build; `ditc parity` does it",
        stage.spec.name,
        count / 1e9,
        stage.precision.value,
    )
    return False


def check_export(stage: StageModule, model: Path) -> float:
    """Run the written graph and the module at two shapes; returns the largest relative L2 error of any output.

    Raises:
        BuildError: with stage, output, sizes and error, when a bound is passed.
    """
    bound = FP16_RELATIVE_L2 if stage.precision is Precision.FP16 else FP32_RELATIVE_L2
    reference = TorchSession(stage.module, stage.spec)
    candidate = OnnxRuntimeSession(model, stage.spec, provider=CPU)
    worst = 0.0
    for second in (False, True):
        sizes = example_sizes(stage.spec, second=second, max_multiple=CHECKED_SIZE)
        feeds = example_feeds(stage.spec, sizes, seed=1 + second, integers=stage.integers)
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
    """Named dimensions become symbols; equal names share one, so torch.export proves that they agree."""
    spec = stage.spec
    dims = {name: _dim(name, spec) for name in spec.profile}
    shapes = [
        {axis: dims[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    ]
    parameters = inspect.signature(stage.module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):  # *rest is one argument, a tuple, to torch.export
        named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        return (*shapes[:named], tuple(shapes[named:]))
    return tuple(shapes)


def _dim(name: str, spec: StageSpec) -> Any:
    """A symbol that reaches beyond the profile: what example_sizes gives must be inside, and one size is no range."""
    step = spec.profile[name].multiple_of
    most = max(spec.profile[name].max // step, 3) + 1
    if step > 1:
        return step * torch.export.Dim(f"{name}_by_{step}", min=1, max=most)
    return torch.export.Dim(name, min=1, max=most)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx warns about opset conversion and prints progress; both are noise in a build."""
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
