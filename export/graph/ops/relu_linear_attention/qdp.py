"""The op as TensorRT's quickly deployable plugin (QDP): the fused kernel goes into the engine as PTX.

Such an engine needs neither Python nor ditc to run. The interface takes one kernel per plugin, so this is
`fused_kernel`, with one program per head, which is meant for up to a few thousand tokens. TensorRT-RTX has no QDP
(1.7.1). This code was never executed: TensorRT needs a GPU to build.
"""

# TensorRT reads the annotations of the functions below as objects. They are set by hand, because the library is
# imported only when it is used.

from collections.abc import Callable
from typing import Any

from ditc.export.graph.ops.relu_linear_attention.onnx_function import DOMAIN, OP_TYPE
from ditc.export.graph.ops.relu_linear_attention.ptx import Kernel, compile_fused
from ditc.runtime.spec import DType

ID = f"{DOMAIN}::{OP_TYPE}"
_registered: set[str] = set()


def register_qdp(trt: Any) -> None:
    """Register the plugin with `tensorrt`, once per process."""

    def describe(q, k, v, eps):  # type: ignore[no-untyped-def]
        return q.like()

    def compiled(q, k, v, eps, outputs, tactic):  # type: ignore[no-untyped-def]
        return fused_launch(trt, q, eps, compile_fused)

    register_as(ID, ("q", "k", "v"), describe, compiled)


# What follows also serves rotary_linear_attention.


def fused_launch(trt: Any, q: Any, eps: Any, compile_fused: Callable[[DType, int, float], Kernel]) -> Any:
    """What TensorRT asks for: the kernel's name and PTX, how it is launched, and its integer arguments."""
    import tensorrt.plugin as trtp

    dtypes = {trt.float32: DType.FLOAT32, trt.float16: DType.FLOAT16, trt.bfloat16: DType.BFLOAT16}
    shape = q.shape_expr
    kernel = compile_fused(dtypes[q.dtype], _constant(shape[3]), float(eps))
    launch = trtp.KernelLaunchParams()
    launch.grid_x = shape[0] * shape[2]
    launch.block_x = kernel.threads
    launch.shared_mem = kernel.shared_bytes
    sizes = trtp.SymIntExprs(2)
    sizes[0], sizes[1] = trtp.SymInt32(shape[1]), trtp.SymInt32(shape[2])
    return kernel.name, kernel.ptx, launch, sizes


def register_as(
    name: str, inputs: tuple[str, ...], describe: Callable[..., Any], compiled: Callable[..., Any]
) -> None:
    """Register both functions under a name, once per process, with the annotations that TensorRT reads.

    Args:
        inputs: the tensors among their parameters. `eps` is a number.
    """
    if name in _registered:
        return
    import tensorrt.plugin as trtp

    given = dict.fromkeys(inputs, trtp.TensorDesc) | {"eps": float}
    answer = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    describe.__annotations__ = {**given, "return": trtp.TensorDesc}
    compiled.__annotations__ = {**given, "return": answer}
    trtp.register(name)(describe)
    trtp.aot_impl(name)(compiled)
    _registered.add(name)


def _constant(size: Any) -> int:
    """The size of a dimension that the graph fixes."""
    return int(size.constant_value() if callable(getattr(size, "constant_value", None)) else size)
