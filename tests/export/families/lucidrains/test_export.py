"""Every configuration of lucidrains/mmdit in ONNX Runtime, compared with the package at two sets of sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from tiny_mmdit import seeded
from torch import Tensor, nn

from ditc.export.contract import StageModule
from ditc.export.families.lucidrains.attention import AdaptiveAttention, JointAttention
from ditc.export.families.lucidrains.generalized import GeneralizedMMDiT
from ditc.export.families.lucidrains.trunk import MMDiT, MMDiTBlock
from ditc.export.graph.onnx import to_model
from ditc.export.graph.ops.sinkhorn.onnx_function import OP_TYPE
from ditc.export.graph.passes.islands import check_islands
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import DType, Precision, Range, StageSpec, TensorSpec

pytest.importorskip("mmdit", reason="the reference is the mmdit package: pip install ditc[dev]")
import mmdit.adaptive_attention as adaptive
import mmdit.mmdit_generalized_pytorch as generalized
import mmdit.mmdit_pytorch as two

FP32_BOUND = 1e-5  # the kernels are not PyTorch's; measured 2e-7 to 3e-6
DIMS = (24, 32, 16)  # text, image, a third modality
COND = 12
HEADS = {"dim_head": 8, "heads": 2}
PAIR = {"dim_text": DIMS[0], "dim_image": DIMS[1], **HEADS}
NAMES = ("text", "image", "audio")
SIZES = ({"batch": 3, "text": 6, "image": 9, "audio": 4}, {"batch": 4, "text": 11, "image": 16, "audio": 7})
Call = Callable[..., Any]
Make = Callable[[], nn.Module]


class Cased(nn.Module):
    """A network with the inputs that all cases share: tokens and masks of three modalities, and a condition."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, text: Tensor, image: Tensor, audio: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.call(self.network, text, image, audio, rest[:3], rest[3]))


CASES: dict[str, tuple[Make, Make, Call, Call]] = {
    "joint attention, qk-norm, all masked": (
        lambda: two.JointAttention(dim_inputs=DIMS, qk_rmsnorm=True, **HEADS),
        lambda: JointAttention(DIMS, qk_rmsnorm=True, **HEADS),
        lambda m, t, i, a, masks, c: m((t, i, a), masks),
        lambda m, t, i, a, masks, c: m((t, i, a), masks),
    ),
    "joint attention, soft clamp, no mask": (
        lambda: two.JointAttention(dim_inputs=DIMS, softclamp=True, softclamp_value=2.0, **HEADS),
        lambda: JointAttention(DIMS, softclamp=2.0, **HEADS),
        lambda m, t, i, a, masks, c: m((t, i, a)),
        lambda m, t, i, a, masks, c: m((t, i, a)),
    ),
    "adaptive attention, 4 sets": (
        lambda: adaptive.AdaptiveAttention(dim=DIMS[1], num_adaptive_weights=4, **HEADS),
        lambda: AdaptiveAttention(dim=DIMS[1], num_adaptive_weights=4, **HEADS),
        lambda m, t, i, a, masks, c: (m(i, masks[1]),),
        lambda m, t, i, a, masks, c: (m(i, masks[1]),),
    ),
    "adaptive attention, 1 set": (
        lambda: adaptive.AdaptiveAttention(dim=DIMS[1], **HEADS),
        lambda: AdaptiveAttention(dim=DIMS[1], **HEADS),
        lambda m, t, i, a, masks, c: (m(i),),
        lambda m, t, i, a, masks, c: (m(i),),
    ),
    "block": (
        lambda: two.MMDiTBlock(dim_cond=COND, **PAIR),
        lambda: MMDiTBlock(dim_cond=COND, **PAIR),
        lambda m, t, i, a, masks, c: m(text_tokens=t, image_tokens=i, text_mask=masks[0], time_cond=c),
        lambda m, t, i, a, masks, c: m(t, i, masks[0], F.silu(c)),
    ),
    "1 stream, registers": (
        lambda: two.MMDiT(depth=2, dim_cond=COND, num_residual_streams=1, num_register_tokens=3, **PAIR),
        lambda: MMDiT(depth=2, dim_cond=COND, num_residual_streams=1, num_register_tokens=3, **PAIR),
        lambda m, t, i, a, masks, c: m(text_tokens=t, image_tokens=i, text_mask=masks[0], time_cond=c),
        lambda m, t, i, a, masks, c: m(t, i, masks[0], c),
    ),
    "4 streams": (
        lambda: two.MMDiT(depth=1, dim_cond=COND, num_register_tokens=3, **PAIR),
        lambda: MMDiT(depth=1, dim_cond=COND, num_register_tokens=3, **PAIR),
        lambda m, t, i, a, masks, c: m(text_tokens=t, image_tokens=i, text_mask=masks[0], time_cond=c),
        lambda m, t, i, a, masks, c: m(t, i, masks[0], c),
    ),
    "3 modalities, 1 stream": (
        lambda: generalized.MMDiT(depth=1, dim_modalities=DIMS, dim_cond=COND, num_residual_streams=1, **HEADS),
        lambda: GeneralizedMMDiT(depth=1, dim_modalities=DIMS, dim_cond=COND, num_residual_streams=1, **HEADS),
        lambda m, t, i, a, masks, c: m(modality_tokens=(t, i, a), modality_masks=masks, time_cond=c),
        lambda m, t, i, a, masks, c: m((t, i, a), masks, c),
    ),
    "2 modalities, 4 streams": (
        lambda: generalized.MMDiT(depth=1, dim_modalities=DIMS[:2], **HEADS),
        lambda: GeneralizedMMDiT(depth=1, dim_modalities=DIMS[:2], **HEADS),
        lambda m, t, i, a, masks, c: m(modality_tokens=(t, i), modality_masks=masks[:2]),
        lambda m, t, i, a, masks, c: m((t, i), masks[:2]),
    ),
    "3 modalities, 4 streams": (
        lambda: generalized.MMDiT(depth=1, dim_modalities=DIMS, dim_cond=COND, **HEADS),
        lambda: GeneralizedMMDiT(depth=1, dim_modalities=DIMS, dim_cond=COND, **HEADS),
        lambda m, t, i, a, masks, c: m(modality_tokens=(t, i, a), modality_masks=(masks[0], None, None), time_cond=c),
        lambda m, t, i, a, masks, c: m((t, i, a), (masks[0], None, None), c),
    ),
}  # fmt: skip


def case(name: str) -> tuple[Cased, StageModule]:
    """Upstream's seeded module, and ditc's module with the same weights as a stage."""
    make_upstream, make_ours, call_upstream, call_ours = CASES[name]
    upstream = seeded(make_upstream())
    ours = make_ours().eval()
    loaded = ours.load_state_dict(upstream.state_dict(), strict=False)
    assert not loaded.missing_keys
    f32 = DType.FLOAT32
    tokens = (TensorSpec(n, f32, ("batch", n, dim)) for n, dim in zip(NAMES, DIMS, strict=True))
    masks = (TensorSpec(f"{n}_mask", f32, ("batch", n)) for n in NAMES)
    reference = Cased(
        upstream, lambda m, t, i, a, given, c: call_upstream(m, t, i, a, [x > 0 for x in given], c)
    )
    outputs = len(reference(*inputs(SIZES[0]).values()))
    spec = StageSpec(
        "trunk",
        inputs=(*tokens, *masks, TensorSpec("cond", f32, ("batch", COND))),
        outputs=tuple(TensorSpec(f"out_{index}", f32, ("batch",)) for index in range(outputs)),
        profile={"batch": Range(1, 2, 8), **{name: Range(1, 8, 32) for name in NAMES}},
    )
    return reference, StageModule(
        spec=spec, precision=Precision.FP32, module=Cased(ours, call_ours), weights=()
    )


def inputs(sizes: dict[str, int]) -> dict[str, Tensor]:
    """Seeded inputs. The first sample has no mask, the second is half masked, and the third is fully masked."""
    generator = torch.Generator().manual_seed(sizes["text"])
    batch = sizes["batch"]
    given = {
        name: torch.randn(batch, sizes[name], dim, generator=generator)
        for name, dim in zip(NAMES, DIMS, strict=True)
    }
    for name in NAMES:
        mask = torch.ones(batch, sizes[name])
        mask[1, 1::2], mask[2] = 0, 0
        given[f"{name}_mask"] = mask
    return {**given, "cond": torch.randn(batch, COND, generator=generator)}


# The networks of these cases are part of other cases, or of a bundle in test_adapter.py, so only the long run has them.
SLOW = {
    "joint attention, qk-norm, all masked",  # this is opset 20; every run tests it at opset 23
    "joint attention, soft clamp, no mask",
    "adaptive attention, 1 set",
    "block",
    "1 stream, registers",
    "3 modalities, 1 stream",
    "3 modalities, 4 streams",
}
# Largest number of nodes. Measured: 339 for 3 modalities without masks, where upstream's own export has 1,360.
NODES = {"2 modalities, 4 streams": 260, "3 modalities, 4 streams": 400}
FAST_FIRST = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]


@pytest.mark.parametrize("name", FAST_FIRST)
def test_the_graph_matches_upstream_at_two_sets_of_sizes(name: str, tmp_path: Path, relative_l2) -> None:
    reference, stage = case(name)
    model = check_graph(reference, stage, tmp_path / "trunk.onnx", relative_l2)
    if name in NODES:
        check_compact(model, modalities=int(name[0]), nodes=NODES[name])


def test_masked_attention_is_one_attention_node_at_opset_23(tmp_path: Path, relative_l2) -> None:
    masked = case("joint attention, qk-norm, all masked")
    model = check_graph(*masked, tmp_path / "trunk.onnx", relative_l2, opset=23)
    assert [node.op_type for node in model.graph if node.op_type in ("Attention", "Softmax")] == ["Attention"]


def check_graph(
    reference: Cased, stage: StageModule, path: Path, relative_l2: Callable[..., float], opset: int = 20
) -> ir.Model:
    """Export the stage, and compare its graph with the reference at both sizes."""
    model = to_model(stage, opset)
    check_islands(model, stage.spec)
    ir.save(model, path)
    session = OnnxRuntimeSession(path, stage.spec, provider=CPU)
    for sizes in SIZES:
        given = inputs(sizes)
        got = session.run({key: value.numpy() for key, value in given.items()})
        for value, wanted in zip(got.values(), reference(*given.values()), strict=True):
            assert relative_l2(torch.from_numpy(np.asarray(value)), wanted) <= FP32_BOUND
    return model


def check_compact(model: ir.Model, *, modalities: int, nodes: int) -> None:
    """Each modality and branch has one Sinkhorn node that calls one shared function, not 20 iterations of its own."""
    calls = [node for node in model.graph if node.op_type == OP_TYPE]
    assert len(calls) == 2 * modalities
    assert [function.name for function in model.functions.values()] == [OP_TYPE]
    assert len(list(model.graph)) <= nodes
