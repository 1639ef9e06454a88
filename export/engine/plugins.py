"""Prepare a graph so that ditc's plugin computes its linear attention instead of standard ops.

The prepared graph is the same ONNX without the function's body, and with the compiled kernels as an attribute of each
node. Without a body, the parser has nothing to inline and looks for a plugin of that name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx

from ditc.export.engine.tensorrt import load_library
from ditc.export.graph.ops.relu_linear_attention import onnx_function, ptx, qdp
from ditc.export.graph.ops.rotary_linear_attention import onnx_function as rotary_function
from ditc.export.graph.ops.rotary_linear_attention import ptx as rotary_ptx
from ditc.export.graph.ops.rotary_linear_attention import qdp as rotary_qdp
from ditc.runtime.atomic import scratch_file
from ditc.runtime.errors import BuildError
from ditc.runtime.gpu import RTX_LIBRARY, rtx_library_folder
from ditc.runtime.plugins import register
from ditc.runtime.plugins.linear_attention import NAMESPACE, VERSION
from ditc.runtime.spec import Backend, DType

log = logging.getLogger(__name__)

_TYPES = {
    onnx.TensorProto.FLOAT: DType.FLOAT32,
    onnx.TensorProto.FLOAT16: DType.FLOAT16,
    onnx.TensorProto.BFLOAT16: DType.BFLOAT16,
}
# The ops that plugins compute, and what compiles their kernels.
_KERNELS = {
    (onnx_function.DOMAIN, onnx_function.OP_TYPE): ptx.pair_as_json,
    (onnx_function.DOMAIN, rotary_function.OP_TYPE): rotary_ptx.pair_as_json,
}


@contextmanager
def with_plugin(onnx_path: Path, backend: Backend) -> Iterator[Path]:
    """A temporary copy of the graph in which the backend's plugin computes the linear attention.

    The copy lies beside the graph, so that it finds the weights. TensorRT-RTX uses the IPluginV3 of runtime/plugins,
    with its kernels in the graph. TensorRT uses the QDP plugins of export/graph/ops/*/qdp.py, which
    store their kernel in the engine, so that running the engine needs no plugin.

    Raises:
        BuildError: the graph has no linear attention.
        MissingExtra: Triton is not installed.
    """
    model = onnx.load(onnx_path, load_external_data=False)
    if not use_plugin(model, kernels=backend is Backend.TENSORRT_RTX):
        raise BuildError(
            f"{onnx_path} has no linear attention that a plugin could compute",
            hint="leave --linear-attention plugin out",
        )
    if backend is Backend.TENSORRT_RTX:
        link_library()
    _register(backend)
    with scratch_file(onnx_path, model.SerializeToString()) as copy:
        yield copy


def has_linear_attention(onnx_path: Path) -> bool:
    """Whether the graph calls ditc's linear-attention op."""
    model = onnx.load(onnx_path, load_external_data=False)
    return any(_is_ours(node) for node in model.graph.node)


def use_plugin(model: onnx.ModelProto, *, kernels: bool) -> int:
    """Remove the op's body and name the plugin in each node, in place. Returns the number of nodes.

    Args:
        kernels: whether to store the compiled kernels in each node.

    Raises:
        BuildError: the graph does not say the type or head dimension of a node.
        MissingExtra: Triton is not installed.
    """
    values = {v.name: v.type.tensor_type for v in (*model.graph.value_info, *model.graph.input)}
    nodes = [node for node in model.graph.node if _is_ours(node)]
    for node in nodes:
        facts = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}
        if kernels:
            facts["kernels"] = _KERNELS[node.domain, node.op_type](*_facts(node, values))
        node.attribute.extend(onnx.helper.make_attribute(name, text) for name, text in facts.items())
    kept = [f for f in model.functions if (f.domain, f.name) not in _KERNELS]
    del model.functions[:]
    model.functions.extend(kept)
    return len(nodes)


def link_library() -> None:
    """Make the link libtensorrt_rtx.so, which the wheel of TensorRT-RTX lacks and plugins need.

    When the parser has made a plugin, it opens libtensorrt_rtx.so, but the wheel (1.7.1) ships only
    libtensorrt_rtx.so.1. Without the link, the process ends with "terminate called without an active exception".

    Raises:
        BuildError: the folder cannot be written. The hint has the command that makes the link.
    """
    folder = rtx_library_folder()
    if folder is None or os.name == "nt" or _reachable(folder):
        return
    link = folder / RTX_LIBRARY
    try:
        link.symlink_to(f"{RTX_LIBRARY}.1")
    except OSError as e:
        raise BuildError(
            f"TensorRT-RTX's parser needs {link} for plugins, and it cannot be made: {e.strerror}",
            hint=f"ln -s {RTX_LIBRARY}.1 {link}, or make a link of that name in a folder of LD_LIBRARY_PATH",
        ) from e
    log.warning("made the link %s -> %s.1, which the wheel lacks and plugins need", link, RTX_LIBRARY)


def _register(backend: Backend) -> None:
    library = load_library(backend)
    if backend is Backend.TENSORRT_RTX:
        register(library)
    else:
        qdp.register_qdp(library)
        rotary_qdp.register_qdp(library)


def _reachable(folder: Path) -> bool:
    searched = [folder, *map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")))]
    return any((path / RTX_LIBRARY).exists() for path in searched)


def _is_ours(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) in _KERNELS


def _facts(node: onnx.NodeProto, values: dict[str, Any]) -> tuple[DType, int]:
    """The element type and head dimension, taken from any of the node's tensors that the graph describes."""
    for name in (*node.input[:3], *node.output):  # q, k, v, out
        known = values.get(name)
        if known is None or known.elem_type not in _TYPES or len(known.shape.dim) != 4:
            continue
        if known.shape.dim[3].HasField("dim_value"):
            return _TYPES[known.elem_type], known.shape.dim[3].dim_value
    raise BuildError(
        f"{node.name}: the graph does not say the type and head dimension of {node.input[0]}",
        hint="export the stage again",
    )
