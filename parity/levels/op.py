"""Op level: the linear attention of the bundle's graphs, run alone and compared with its definition in fp64."""

# B batch, N tokens, H heads, D head dim

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ditc.export.graph.ops.relu_linear_attention import onnx_function as relu
from ditc.export.graph.ops.relu_linear_attention.onnx_function import DOMAIN
from ditc.export.graph.ops.relu_linear_attention.reference import relu_linear_attention_reference
from ditc.export.graph.ops.relu_linear_attention.torch_op import DIFFUSERS_EPS, relu_linear_attention
from ditc.export.graph.ops.rotary_linear_attention import onnx_function as rotary
from ditc.export.graph.ops.rotary_linear_attention.reference import rotary_linear_attention_reference
from ditc.export.graph.ops.rotary_linear_attention.torch_op import rotary_linear_attention
from ditc.export.graph.passes.scopes import module_path
from ditc.parity.compare import compare
from ditc.parity.context import Context
from ditc.parity.results import Culprit, Result, failed, judged, not_checked
from ditc.runtime.cores import default_threads
from ditc.runtime.session import Array
from ditc.runtime.spec import Precision
from ditc.runtime.tolerances import Level, Metric, limit

TORCH_DTYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class OpCase:
    """The inputs of one comparison: q, k and v (B,N,H,D), and fp32 tables of cosines and sines (N,D/2)."""

    name: str
    qkv: tuple[Array, ...]
    tables: tuple[Array, ...]


@dataclass(frozen=True, slots=True)
class Op:
    """A linear attention: its PyTorch op, its definition in fp64, and whether both take tables after q, k and v."""

    torch_op: Callable[..., torch.Tensor]
    definition: Callable[..., torch.Tensor]
    rotary: bool = False

    def inputs(self, case: OpCase) -> tuple[Array, ...]:
        """What the op takes of the case."""
        return (*case.qkv, *(case.tables if self.rotary else ()))


OPS = {
    relu.OP_TYPE: Op(relu_linear_attention, relu_linear_attention_reference),
    rotary.OP_TYPE: Op(rotary_linear_attention, rotary_linear_attention_reference, rotary=True),
}


def cases(head_dim: int) -> Iterator[OpCase]:
    """Yield inputs with few tokens, with many, with large values, and with a query that ReLU turns into zeros."""
    rng = np.random.default_rng(0)

    def draw(name: str, tokens: int, scale: float = 1.0) -> OpCase:
        qkv = tuple(scale * rng.standard_normal((2, tokens, 2, head_dim), np.float32) for _ in range(3))
        angles = rng.uniform(0, 6, (tokens, head_dim // 2))
        return OpCase(name, qkv, (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)))

    yield draw("64 tokens", 64)
    yield draw("1024 tokens", 1024)
    yield draw("values of 100", 64, 100.0)
    case = draw("an all-zero query", 64)
    case.qkv[0][0, 3] = -1.0  # the ReLU leaves zeros: 0 / (0 + eps) is 0, but 0 / 0 is NaN
    yield case


def check(context: Context) -> Iterator[Result]:
    """Check PyTorch's op, and the op of the candidate's graphs once per stage and eps."""
    yield from _check_torch_op()
    found = False
    for stage in context.candidate.graphs:
        model = context.candidate.graph(stage)
        assert model is not None
        for node in _distinct(model):
            found = True
            context.tick(f"op, {stage}")
            yield from _check_node(stage, model, node, context.candidate.precision(stage))
    if context.candidate.graphs and not found:
        yield not_checked(Level.OP, "denoiser", relu.OP_TYPE, "no graph of the bundle has the op as a node")


def _check_torch_op() -> Iterator[Result]:
    bound, op = limit(Level.OP, Metric.RELATIVE_L2, Precision.FP32), OPS[relu.OP_TYPE]
    for case in cases(32):
        got = op.torch_op(*map(torch.from_numpy, op.inputs(case)), DIFFUSERS_EPS).numpy()
        comparison = compare("out", got, _reference(op, case))
        yield judged(
            Level.OP,
            "PyTorch",
            case.name,
            Metric.RELATIVE_L2,
            comparison.error,
            bound,
            against="fp64 definition",
            worst=comparison.worst,
            detail=comparison.problem,
        )


def _check_node(stage: str, model: ir.Model, node: ir.Node, precision: Precision) -> Iterator[Result]:
    if precision not in (Precision.FP32, Precision.FP16):
        precision_name = precision.value
        if precision is Precision.BF16:
            yield not_checked(
                Level.OP, stage, node.op_type, f"ONNX Runtime's CPU provider has no {precision_name} kernels"
            )
            return
        precision = Precision.FP32  # 8-bit graphs do not quantize the op
    module, op = module_path(node) or "", OPS[node.op_type]
    bound = limit(Level.OP, Metric.RELATIVE_L2, precision)
    run = _runner(model, node, precision)
    dtype = np.float16 if precision is Precision.FP16 else np.float32
    for case in cases(16):
        given = OpCase(case.name, tuple(x.astype(dtype) for x in case.qkv), case.tables)
        comparison = compare("out", run(*op.inputs(given)), _reference(op, given))
        culprit = None
        if comparison.error != comparison.error or (bound and comparison.error > bound.bound):
            culprit = Culprit(
                stage=stage, module=module, error=comparison.error, before=0.0, worst=comparison.worst
            )
        common = {
            "against": "fp64 definition",
            "worst": comparison.worst,
            "culprit": culprit,
            "causes": _causes(node, case, comparison.error) if culprit else (),
        }
        if comparison.problem:
            yield failed(
                Level.OP, stage, case.name, comparison.problem, bound=bound.bound if bound else None, **common
            )
        else:
            yield judged(Level.OP, stage, case.name, Metric.RELATIVE_L2, comparison.error, bound, **common)


def _causes(node: ir.Node, case: OpCase, error: float) -> tuple[str, ...]:
    eps = node.attributes.get_float("eps", 0.0)
    if np.float32(eps) == 0:
        return (
            f"the eps of the denominator is {eps:g} (PyTorch has {DIFFUSERS_EPS:g}): an all-zero query gives 0/0",
        )
    if case.name == "an all-zero query" and error != error:
        return ("the eps of the denominator gets lost: is the denominator computed in fp16?",)
    return (
        "the op's body differs from its definition: is the sum of the keys, which gives the denominator, missing?",
    )


def _reference(op: Op, case: OpCase) -> Array:
    out: Array = op.definition(*map(torch.from_numpy, op.inputs(case)), DIFFUSERS_EPS).numpy()
    return out


def _distinct(model: ir.Model) -> list[ir.Node]:
    """The first node of every op and eps. Nodes with the same eps run the same body."""
    nodes = [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type in OPS]
    return list({(n.op_type, n.attributes.get_float("eps", 0.0)): n for n in reversed(nodes)}.values())


def _runner(model: ir.Model, node: ir.Node, precision: Precision) -> Callable[..., Array]:
    """A function that runs the op alone, with the body that the model carries."""
    import onnx
    import onnxruntime as ort

    kind = onnx.TensorProto.FLOAT16 if precision is Precision.FP16 else onnx.TensorProto.FLOAT
    shapes = {name: ["B", "N", "H", "D"] for name in ("q", "k", "v")}
    types = dict.fromkeys(shapes, kind)
    if OPS[node.op_type].rotary:
        shapes |= {name: ["N", "E"] for name in ("cos", "sin")}
    inputs = [
        onnx.helper.make_tensor_value_info(name, types.get(name, onnx.TensorProto.FLOAT), shape)
        for name, shape in shapes.items()
    ]
    out = onnx.helper.make_tensor_value_info("out", kind, shapes["q"])
    call = onnx.helper.make_node(
        node.op_type, [*shapes], ["out"], domain=DOMAIN, eps=node.attributes.get_float("eps", 0.0)
    )
    graph = onnx.helper.make_graph([call], "op", inputs, [out])
    function = ir.to_proto(model.functions[node.op_identifier()])
    opsets = [onnx.helper.make_opsetid("", model.opset_imports[""]), onnx.helper.make_opsetid(DOMAIN, 1)]
    proto = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = default_threads()
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(*values: Array) -> Array:
        result: Array = session.run(["out"], dict(zip(shapes, values, strict=True)))[0]
        return result

    return run
