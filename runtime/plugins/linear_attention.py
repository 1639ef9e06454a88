"""The linear-attention plugins for TensorRT-RTX: IPluginV3 objects whose kernels are stored in the engine.

An ONNX node ditc::ReluLinearAttention(q, k, v) or ditc::RotaryLinearAttention(q, k, v, cos, sin), with the attributes
`eps` and `kernels` (PTX and sizes as JSON, see ptx.py of the exporter's ops), becomes such a plugin. The engine holds
both attributes. A machine that runs it needs Python, this module and cuda-python, but neither the kernel compiler nor
the exporter.
"""

# B batch, N tokens, H heads, D head dim, S shares of the tokens

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ditc.runtime.errors import SessionError
from ditc.runtime.plugins.kernels import Pointer, PtxKernel

NAMES, VERSION, NAMESPACE = ("ReluLinearAttention", "RotaryLinearAttention"), "1", "ditc"
QKV = 3  # the first inputs of a node have the kernels' type; the tables after them are fp32
# Tokens per program of the first kernel. At 1024 tokens x 70 heads x batch 2, this gives enough programs to fill a GPU.
SHARE = 512


class Launcher:
    """Computes the sizes of the two kernels and launches them. It does not use TensorRT.

    Args:
        eps: added to the denominator.
        data: the node's `kernels` attribute.

    Raises:
        SessionError: the data was not written by ditc.
    """

    def __init__(self, eps: float, data: str) -> None:
        self.eps, self.data = eps, data
        try:
            facts = json.loads(data)
            self.dtype = str(facts["dtype"])
            self.block_n, self.block_d = int(facts["block_n"]), int(facts["block_d"])
            self.kv, self.out = PtxKernel(**facts["kv"]), PtxKernel(**facts["out"])
        except (ValueError, KeyError, TypeError) as e:
            raise SessionError(
                f"the linear-attention plugin's kernels cannot be read: {e}",
                hint="build the engine again with this version of ditc",
            ) from e

    def shares(self, tokens: int) -> int:
        """S, the number of shares for this number of tokens."""
        return -(-tokens // SHARE)

    def workspace_bytes(self, batch: int, tokens: int, heads: int) -> int:
        """Size of the partial sums, which are a matrix and a vector in fp32 for each head and share."""
        return batch * heads * self.shares(tokens) * (self.block_d + 1) * self.block_d * 4

    def launch(
        self, shape: tuple[int, ...], inputs: Sequence[int], out: int, workspace: int, stream: int
    ) -> None:
        """Launch both kernels in the stream.

        Args:
            shape: (B,N,H,D), the shape of q, k, v and out.
            inputs: addresses of q, k and v, and of the tables of a rotary attention.
            out, workspace: addresses on the device.
        """
        q, k, v, *tables = map(Pointer, inputs)
        batch, tokens, heads, _ = shape
        shares = self.shares(tokens)
        kv = Pointer(workspace)
        total = Pointer(workspace + batch * heads * shares * self.block_d**2 * 4)
        ints = (tokens, heads, SHARE)
        self.kv.launch((shares, batch * heads), (k, v, *tables, kv, total, *ints), stream)
        blocks = -(-tokens // self.block_n)
        rest = (tokens, heads, shares, float(self.eps))
        self.out.launch((blocks, batch * heads), (q, *tables, kv, total, Pointer(out), *rest), stream)


def make_creator(trt: Any, op: str) -> Any:
    """The creator of the plugin of one of the NAMES. Its class is made here, because its bases are the library's."""
    plugin = _plugin_class(trt, op)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = op, VERSION, NAMESPACE
            none = np.array([], np.float32)
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField("eps", none, trt.PluginFieldType.FLOAT32),
                    trt.PluginField("kernels", none, trt.PluginFieldType.CHAR),
                ]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            found = {field.name: field for field in fields}
            eps = float(np.asarray(found["eps"].data).reshape(-1)[0])
            return plugin(Launcher(eps, _text(found["kernels"].data)))

    return Creator()


def _text(data: Any) -> str:
    """The text of a CHAR field, which the library passes as bytes, text or numbers."""
    if isinstance(data, str):
        return data
    raw = bytes(data) if isinstance(data, (bytes, bytearray)) else np.asarray(data).astype(np.uint8).tobytes()
    return raw.rstrip(b"\0").decode()


def _plugin_class(trt: Any, op: str) -> Any:
    types = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16}
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc, unused-ignore]
        def __init__(self, launcher: Launcher) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = op, VERSION, NAMESPACE
            self.num_outputs = 1
            self.launcher = launcher
            # PluginField keeps bare pointers, which are read later, so the bytes must live as long as the plugin.
            self._eps, self._kernels = np.array([launcher.eps], np.float32), launcher.data.encode()
            self._stored = trt.PluginFieldCollection(
                [
                    trt.PluginField("eps", self._eps, trt.PluginFieldType.FLOAT32),
                    trt.PluginField("kernels", self._kernels, trt.PluginFieldType.CHAR),
                ]
            )

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return type(self)(self.launcher)

        def get_output_data_types(self, input_types: Any) -> Any:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> Any:
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            desc = in_out[pos].desc
            wanted = trt.float32 if QKV <= pos < num_inputs else types[self.launcher.dtype]
            return bool(desc.format == trt.TensorFormat.LINEAR and desc.type == wanted)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            batch, tokens, heads, _ = tuple(inputs[0].max)
            return self.launcher.workspace_bytes(batch, tokens, heads)

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return self._stored

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            # Unlike in C++, failures are exceptions: the bindings ignore the return value, as their docstring says.
            self.launcher.launch(tuple(input_desc[0].dims), inputs, outputs[0], workspace, stream)

    return Plugin
