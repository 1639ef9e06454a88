"""The op as TensorRT's quickly deployable plugin (QDP): the fused kernel goes into the engine as PTX.

Such an engine needs neither Python nor ditc to run. The interface takes one kernel per plugin, so this is
`fused_kernel`, with one program per head, which is meant for up to a few thousand tokens. TensorRT-RTX has no QDP
(1.7.1). This code was never executed: TensorRT needs a GPU to build.
"""

# TensorRT reads the annotations of the functions below as objects. They are set by hand, because the library is
# imported only when it is used.

from typing import Any

from ditc.export.graph.ops.relu_linear_attention.onnx_function import DOMAIN, OP_TYPE
from ditc.export.graph.ops.relu_linear_attention.ptx import compile_fused
from ditc.runtime.spec import DType

ID = f"{DOMAIN}::{OP_TYPE}"
_registered: set[str] = set()


def register_qdp(trt: Any) -> None:
    """Register the plugin with `tensorrt`, once per process."""
    if ID in _registered:
        return
    import tensorrt.plugin as trtp

    dtypes = {trt.float32: DType.FLOAT32, trt.float16: DType.FLOAT16, trt.bfloat16: DType.BFLOAT16}

    def describe(q, k, v, eps):  # type: ignore[no-untyped-def]
        return q.like()

    def compiled(q, k, v, eps, outputs, tactic):  # type: ignore[no-untyped-def]
        shape = q.shape_expr
        kernel = compile_fused(dtypes[q.dtype], _constant(shape[3]), float(eps))
        launch = trtp.KernelLaunchParams()
        launch.grid_x = shape[0] * shape[2]
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared_bytes
        sizes = trtp.SymIntExprs(2)
        sizes[0], sizes[1] = trtp.SymInt32(shape[1]), trtp.SymInt32(shape[2])
        return kernel.name, kernel.ptx, launch, sizes

    tensor = trtp.TensorDesc
    describe.__annotations__ = {"q": tensor, "k": tensor, "v": tensor, "eps": float, "return": tensor}
    given = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    compiled.__annotations__ = {"q": tensor, "k": tensor, "v": tensor, "eps": float, "return": given}
    trtp.register(ID)(describe)
    trtp.aot_impl(ID)(compiled)
    _registered.add(ID)


def _constant(size: Any) -> int:
    """The size of a dimension that the graph fixes."""
    return int(size.constant_value() if callable(getattr(size, "constant_value", None)) else size)
