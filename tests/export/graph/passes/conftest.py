"""One small denoiser step, exported in three precisions, and a way to run any graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from ditc.export.contract import StageModule
from ditc.export.families.sana.config import SanaConfig
from ditc.export.families.sana.network import SanaDenoiser
from ditc.export.graph import ops
from ditc.export.graph.step import wrap
from ditc.export.networks.loading import weight_map
from ditc.runtime.spec import DENOISER, DType, Precision, Range, StageSpec, TensorSpec
from ditc.runtime.step_contract import StepContract

CONFIG = SanaConfig.from_json(
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "sample_size": 4,
        "qk_norm": "rms_norm_across_heads",
    }
)
IMAGE = ("batch", 8, "height", "width")
DTYPES = {
    Precision.FP32: (torch.float32, DType.FLOAT32),
    Precision.FP16: (torch.float16, DType.FLOAT16),
    Precision.BF16: (torch.bfloat16, DType.BFLOAT16),
}


def step_spec(kv: DType) -> StageSpec:
    """The interface of a second-order step around a network with one layer."""
    single = {
        "latents": IMAGE,
        "timestep": ("batch",),
        "guidance_weights": ("batch", "rows"),
        "coefficients": ("batch", 6),
        "history": ("batch", 1, *IMAGE[1:]),
        "text_bias": ("rows", "text_length"),
    }
    inputs = {name: TensorSpec(name, DType.FLOAT32, shape) for name, shape in single.items()}
    inputs["row_of"] = TensorSpec("row_of", DType.INT64, ("rows",))
    inputs["cross_kv"] = TensorSpec("cross_kv", kv, ("rows", 1, 2, "text_length", 32))
    order = [
        "latents",
        "row_of",
        "timestep",
        "guidance_weights",
        "coefficients",
        "history",
        "cross_kv",
        "text_bias",
    ]
    outputs = {"next_latents": IMAGE, "x0": IMAGE, "next_history": single["history"], "stats": ("batch", 2)}
    return StageSpec(
        DENOISER,
        tuple(inputs[name] for name in order),
        tuple(TensorSpec(name, DType.FLOAT32, shape) for name, shape in outputs.items()),
        {
            "batch": Range(1, 1, 4),
            "rows": Range(1, 2, 8),
            "height": Range(4, 8, 16),
            "width": Range(4, 8, 16),
            "text_length": Range(1, 12, 12),
        },
    )


@pytest.fixture(scope="session")
def denoiser_stage() -> Callable[[Precision], StageModule]:
    """A function that makes the step in a precision, always with the weights of the same seed."""

    @cache
    def make(precision: Precision) -> StageModule:
        torch_dtype, dtype = DTYPES[precision]
        torch.manual_seed(0)
        network = SanaDenoiser(CONFIG)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() < 2:
                    parameter.add_(
                        0.1 * torch.randn_like(parameter)
                    )  # plain ones and zeros would hide mistakes
        step = wrap(network.to(torch_dtype), dtype=torch_dtype, contract=StepContract()).requires_grad_(False)
        spec = step_spec(dtype)
        return StageModule(
            spec=spec, precision=precision, module=step, weights=tuple(weight_map({spec.name: step}))
        )

    return make


@dataclass(frozen=True)
class Runner:
    """Runs graphs from memory in ONNX Runtime."""

    optimize: bool = True

    def __call__(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        if not self.optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model = model.clone()
        ops.add_functions(model)
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.fixture(scope="session")
def run() -> Runner:
    """A function that runs a graph and returns its outputs by name."""
    return Runner()


@pytest.fixture(scope="session")
def unchanged(run) -> Callable[[Callable[[ir.Model], None], ir.Model, list[dict[str, np.ndarray]]], ir.Model]:
    """A function that applies a pass to a copy, and proves with ONNX Runtime that every output stays as it was."""
    from ditc.export.graph.onnx import FP32_RELATIVE_L2
    from ditc.runtime.metrics import relative_l2

    def prove(
        step: Callable[[ir.Model], None], model: ir.Model, feeds: list[dict[str, np.ndarray]]
    ) -> ir.Model:
        after = model.clone()
        step(after)
        for feed in feeds:
            expected, got = run(model, feed), run(after, feed)
            assert expected.keys() == got.keys()
            for name in expected:
                assert got[name].shape == expected[name].shape and got[name].dtype == expected[name].dtype
                # ONNX Runtime fuses other nodes and so rounds differently. The bound is that of to_onnx's own check.
                assert relative_l2(got[name], expected[name]) <= FP32_RELATIVE_L2, f"{step.__name__}: {name}"
        return after

    return prove


@pytest.fixture(scope="session")
def exported(denoiser_stage) -> Callable[[Precision], tuple[StageModule, ir.Model]]:
    """A function that gives the step and its finished graph in a precision.

    The step is traced once. Every caller gets a copy of the graph, which it may change.
    """
    from ditc.export.graph.onnx import to_model

    @cache
    def once(precision: Precision) -> bytes:
        return ir.to_proto(to_model(denoiser_stage(precision))).SerializeToString()

    def export(precision: Precision) -> tuple[StageModule, ir.Model]:
        return denoiser_stage(precision), ir.from_proto(onnx.ModelProto.FromString(once(precision)))

    return export
