"""Equal blocks are traced once, and the graph equals the one that tracing every block gives."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions, StageModule
from ditc.export.families import find_adapter
from ditc.export.graph import onnx as exporter
from ditc.export.graph.passes.expand_repeats import DOMAIN
from ditc.export.graph.passes.scopes import module_path
from ditc.export.graph.trace_repeats import repeated_blocks, trace_blocks_once
from ditc.runtime.spec import DType, Precision, Range, StageSpec, TensorSpec


def both(stage: StageModule, monkeypatch: pytest.MonkeyPatch) -> tuple[ir.Model, ir.Model]:
    """The stage's finished graph, with blocks traced once and with every block traced."""
    once = exporter.to_model(stage)
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "trace_blocks_once", lambda root: nullcontext())
        return once, exporter.to_model(stage)


def digest(model: ir.Model) -> dict[str, str]:
    """A hash per output, of the nodes that compute it: their modules, attributes and inputs, but not their names."""
    known: dict[ir.Value, str] = {}

    def of(value: ir.Value | None) -> str:
        if value is None:
            return ""
        if value not in known:
            parameter = value.is_initializer() and not str(value.name).startswith(("val_", "scalar_tensor"))
            tensor = value.const_value
            known[value] = (
                str(value.name)
                if parameter or tensor is None
                else f"{tensor.dtype}{tensor.shape}" + tensor.tobytes().hex()
            )
        return known[value]

    for node in model.graph:
        assert node.domain != DOMAIN
        attributes = sorted(f"{key}={attribute.value}" for key, attribute in node.attributes.items())
        # A size is shared by several blocks and named after the first that needs it, which may differ.
        module = None if node.outputs[0].dtype is ir.DataType.INT64 else module_path(node)
        text = f"{node.op_identifier()} {module} {attributes} {[of(value) for value in node.inputs]}"
        for index, value in enumerate(node.outputs):
            known[value] = hashlib.sha256(f"{index} {text}".encode()).hexdigest()
    return {str(value.name): of(value) for value in model.graph.outputs}


@pytest.mark.parametrize(
    ("checkpoint", "stage"),
    [
        ("tiny_checkpoint", "denoiser"),
        pytest.param("demo", "text_encoder", marks=pytest.mark.slow),
        pytest.param("demo", "vae_decoder", marks=pytest.mark.slow),
        pytest.param("sd3_checkpoint", "denoiser", marks=pytest.mark.slow),
    ],
)
def test_a_familys_graph_equals_that_of_tracing_every_block(
    checkpoint: str, stage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("demo/checkpoint") if checkpoint == "demo" else request.getfixturevalue(checkpoint)
    source = open_checkpoint(path)
    adapter, options = find_adapter(source), BuildOptions(precision=Precision.FP32)
    module = adapter.load(source, adapter.plan(source, options), stage, options)
    assert repeated_blocks(module.module), "the network repeats blocks"
    once, full = both(module, monkeypatch)
    assert digest(once) == digest(full)
    assert len({node.name for node in once.graph}) == len(once.graph) == len(full.graph)


class Residual(nn.Module):
    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.power = power
        self.linear = nn.Linear(4, 4)
        self.register_buffer("gain", torch.rand(4), persistent=False)

    def forward(self, x: Tensor, tokens: int, *, scale: Tensor | None = None) -> tuple[Tensor, None]:
        y = self.linear(x).reshape(-1, tokens, 4) * self.gain
        return x + (y if scale is None else y * scale) ** self.power, None


class Stack(nn.Module):
    """A stack of blocks. powers: a power per block, which makes blocks differ; scaled: blocks called with a scale."""

    def __init__(self, powers: tuple[int, ...] = (1, 1, 1), scaled: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Residual(power) for power in powers)
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean()
        for index, block in enumerate(self.blocks):
            x, _ = block(x, x.shape[1], scale=scale if index in self.scaled else None)
        return x


SPEC = StageSpec(
    "stack",
    inputs=(TensorSpec("x", DType.FLOAT32, ("batch", "tokens", 4)),),
    outputs=(TensorSpec("out", DType.FLOAT32, ("batch", "tokens", 4)),),
    profile={"batch": Range(1, 2, 4), "tokens": Range(2, 3, 8)},
)


def stage(module: nn.Module) -> StageModule:
    return StageModule(
        spec=SPEC, precision=Precision.FP32, module=module.eval().requires_grad_(False), weights=()
    )


@pytest.mark.parametrize(
    "stack",
    [Stack(), Stack(powers=(1, 2, 1, 2, 2)), Stack(scaled=(1,)), Stack(scaled=(0, 2)), Stack(powers=(1,))],
    ids=["equal", "two groups", "one called differently", "the first called differently", "one block"],
)
def test_the_graph_equals_that_of_tracing_every_block(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, full = both(stage(stack), monkeypatch)
    assert digest(once) == digest(full)
    ir.save(once, tmp_path / "stack.onnx")
    exporter.check_export(stage(stack), tmp_path / "stack.onnx")


def test_a_later_block_is_one_node_in_the_trace() -> None:
    x = torch.zeros(2, 3, 4)
    stack = stage(Stack()).module
    with trace_blocks_once(stack):
        program = torch.onnx.export(stack, (x,), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    names = [node.op_type for node in program.model.graph if node.domain == DOMAIN]
    assert names == ["Enter", "Leave", "Repeat", "Repeat"]


def test_the_network_is_as_it_was_after_the_trace() -> None:
    stack = Stack()
    x = torch.rand(2, 3, 4)
    before = stack(x)
    hooked = stack.blocks[1].forward = stack.blocks[1].forward  # as accelerate's hooks leave a module
    with pytest.raises(RuntimeError, match="stopped"), trace_blocks_once(stack):
        raise RuntimeError("stopped")
    assert [module for module in stack.modules() if "forward" in vars(module)] == [stack.blocks[1]]
    assert stack.blocks[1].forward is hooked
    assert torch.equal(stack(x), before)


def test_blocks_with_other_attributes_or_tensors_are_in_other_groups() -> None:
    wide = Residual()
    wide.linear = nn.Linear(4, 4, bias=False)
    half = Residual().half()
    blocks = nn.ModuleList([Residual(), Residual(2), wide, half, Residual(), Residual(2)])
    assert [list(group) for group in repeated_blocks(blocks)] == [["0", "4"], ["1", "5"]]
