"""Simulate a quantized network in PyTorch: the plan's rounding on weights and inputs, for any subset of the layers.

The simulation computes what the Q/DQ graph computes, up to the order of fp32 sums. It needs no export, so a search can
try hundreds of assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ditc.export.quant.formats import QUANTIZED_MAX, Format, weight_amax
from ditc.export.quant.layers import Layer
from ditc.export.quant.plan import Input, LayerPlan

SMALLEST = torch.finfo(torch.float32).tiny  # what a token of zeros is divided by
QUANTIZED_MIN = {Format.INT8: -128.0, Format.FP8: -448.0}  # where QuantizeLinear saturates


@contextmanager
def quantized(layers: Mapping[str, Layer], plans: Mapping[str, LayerPlan]) -> Iterator[None]:
    """While the context lasts, the planned layers compute as in 8 bits; afterwards they are as before."""
    with ExitStack() as stack:
        for name, plan in plans.items():
            stack.enter_context(_one(layers[name].linear, plan))
        yield


@contextmanager
def _one(linear: nn.Linear | nn.Conv2d, plan: LayerPlan) -> Iterator[None]:
    weight = linear.weight
    smooth = None
    if plan.input is not None and plan.input.smooth is not None:
        smooth = torch.from_numpy(plan.input.smooth).to(weight.device)
    linear.weight = nn.Parameter(fake_quantize_weight(weight, plan.kind, smooth), requires_grad=False)
    handle = None
    if plan.input is not None:
        handle = linear.register_forward_pre_hook(_input_hook(plan, plan.input, smooth))
    try:
        yield
    finally:
        linear.weight = weight
        if handle is not None:
            handle.remove()


def fake_quantize_weight(weight_OI: Tensor, kind: Format, smooth_I: Tensor | None = None) -> Tensor:
    """Quantize and dequantize the weight, (O,I) or a convolution's, with one scale per output channel."""
    weight = weight_OI.float() if smooth_I is None else weight_OI.float() * smooth_I
    if kind is Format.INT8:
        amax = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    else:
        amax = torch.from_numpy(weight_amax(weight.detach().cpu().numpy(), 0, kind)).to(weight.device)
    scale = amax / QUANTIZED_MAX[kind]
    return fake_quantize(weight, torch.where(scale > 0, scale, 1.0), kind).to(weight_OI.dtype)


def fake_quantize(x: Tensor, scale: Tensor, kind: Format) -> Tensor:
    """Quantize and dequantize x; the result is fp32."""
    ratio = x.float() / scale
    if kind is Format.INT8:
        return ratio.round().clamp(QUANTIZED_MIN[kind], QUANTIZED_MAX[kind]) * scale
    return ratio.clamp(QUANTIZED_MIN[kind], QUANTIZED_MAX[kind]).to(torch.float8_e4m3fn).float() * scale


def _input_hook(
    plan: LayerPlan, planned: Input, smooth: Tensor | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    fixed = torch.tensor(planned.amax / QUANTIZED_MAX[plan.kind], dtype=torch.float32)

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = arguments[0].float() if smooth is None else arguments[0].float() / smooth
        amax = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST) if planned.per_token else 1.0
        rounded = fake_quantize(x / amax, fixed.to(x.device), plan.kind) * amax
        return (rounded.to(arguments[0].dtype), *arguments[1:])

    return hook
