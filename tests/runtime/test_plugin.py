"""The linear-attention plugin inside TensorRT-RTX, with placeholder text instead of compiled kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ditc.runtime.errors import SessionError
from ditc.runtime.plugins.kernels import PtxKernel
from ditc.runtime.plugins.linear_attention import NAMES, make_creator
from tests.rtx_link import environment_with_link

trt = pytest.importorskip("tensorrt_rtx", reason='tensorrt-rtx is not installed: pip install "ditc[rtx]"')


def test_an_engine_holds_every_byte_of_the_kernels(tmp_path: Path) -> None:
    """Runs in a separate process: the library reads LD_LIBRARY_PATH at start, and aborts if the link is missing."""
    files = [tmp_path / f"{size}.json" for size in (2000, 5000, 12_000, 30_000, 60_000, 200_000)]
    for file in files:
        file.write_text(_kernels(padding=int(file.stem)))
    script = Path(__file__).with_name("plugin_engine.py")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, files)],
        env=environment_with_link(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for op in NAMES:  # each engine has a plugin of either name
        kernels = {f: f.read_bytes().replace(b"kv_kernel", op.encode()) for f in files}
        lacking = [f.stem for f in files if kernels[f] not in f.with_suffix(".engine").read_bytes()]
        assert not lacking, op


def test_the_fields_of_a_plugin_live_longer_than_the_call_that_returned_them() -> None:
    plugin = _plugin()
    fields = plugin.get_fields_to_serialize()
    others = [np.full(1, 7, np.float32) for _ in range(1000)]  # reuse any memory that has become free
    assert fields[0].data == np.float32(1e-15) and bytes(fields[1].data) == _kernels().encode()
    del others, plugin


def test_a_kernel_that_the_driver_refuses_raises_an_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise SessionError("kernel kv_kernel: invalid argument")

    monkeypatch.setattr(PtxKernel, "launch", refuse)
    desc = [SimpleNamespace(dims=(2, 64, 4, 32))] * 3
    with pytest.raises(SessionError, match="kv_kernel: invalid argument"):
        _plugin().enqueue(desc, desc[:1], [256, 512, 768], [1024], 1280, 0)


def _plugin() -> Any:
    """A plugin that is made from its fields, as the library makes it."""
    eps, kernels = np.array([1e-15], np.float32), np.frombuffer(_kernels().encode(), np.int8)
    fields = trt.PluginFieldCollection(
        [
            trt.PluginField("eps", eps, trt.PluginFieldType.FLOAT32),
            trt.PluginField("kernels", kernels, trt.PluginFieldType.CHAR),
        ]
    )
    return make_creator(trt, NAMES[0]).create_plugin("attention", fields, trt.TensorRTPhase.BUILD)


def _kernels(padding: int = 0) -> str:
    facts = {"dtype": "float32", "block_n": 64, "block_d": 32, "head_dim": 32}
    kernel = {"ptx": "// ", "threads": 128, "shared_bytes": 0}
    kv, out = {"name": "kv_kernel", **kernel, "ptx": "// " + "x" * padding}, {"name": "out_kernel", **kernel}
    return json.dumps({**facts, "kv": kv, "out": out})
