"""The linear-attention kernels: what they compute (in Triton's interpreter), and what they compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime.errors import BuildError, MissingExtra, SessionError
from ditc.runtime.plugins.kernels import Pointer, PtxKernel
from ditc.runtime.plugins.linear_attention import NAMES, SHARE, Launcher
from ditc.runtime.spec import DType
from tests.rtx_link import environment_with_link

pytest.importorskip("triton", reason='Triton is not installed: pip install "ditc[plugin]"')


@pytest.fixture(scope="module", params=["relu", "rotary"])
def interpreted(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script), request.param],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


# fp32: sums of up to 600 products in any order, each rounded by 6e-8; measured 4e-8 to 1.4e-7. fp16: one rounding of
# the result.
BOUNDS = {"torch.float32": 5e-7, "torch.float16": 2.0**-11}


@pytest.mark.parametrize("form", ["pair", "fused", "op"])
def test_kernels_are_as_close_to_fp64_as_the_op_must_be(interpreted: list[dict[str, Any]], form: str) -> None:
    """bf16 is not there: Triton's interpreter (3.9) multiplies the bits of bf16 numbers as integers."""
    rows = [row for row in interpreted if "dtype" in row]
    assert len(rows) == 10
    for row in rows:
        assert row[form] <= BOUNDS[row["dtype"]], row


def test_nan_stays_in_its_row_and_zeros_give_zero(interpreted: list[dict[str, Any]]) -> None:
    facts = {key: value for row in interpreted for key, value in row.items()}
    assert facts["nan_rows"] == [3]  # a ReLU written as a maximum would give 0
    assert facts["zeros"] == 0.0


@pytest.mark.parametrize("op", ["relu", "rotary"])
@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
def test_ptx_is_made_without_a_gpu_and_holds_no_path_of_this_machine(dtype: DType, op: str) -> None:
    from ditc.export.graph.ops.relu_linear_attention import ptx as relu
    from ditc.export.graph.ops.rotary_linear_attention import ptx as rotary

    ptx, tables = (relu, 0) if op == "relu" else (rotary, 2)
    kv, out = ptx.compile_pair(dtype, 32)
    for kernel, parameters in ((kv, 7), (out, 8), (ptx.compile_fused(dtype, 32, 1e-15), 6)):
        assert f".visible .entry {kernel.name}(" in kernel.ptx and ".target sm_80" in kernel.ptx
        header = kernel.ptx.split(".visible .entry", 1)[1].split("{", 1)[0]
        assert header.count(".param") == parameters + tables  # none for Triton's scratch memory
        assert str(Path.home()) not in kernel.ptx and ".file" not in kernel.ptx
    if op == "relu":  # rotated keys are fp32
        assert "mma.sync" in kv.ptx  # tensor cores, adding in fp32
        assert "f32." + {DType.FLOAT16: "f16", DType.BFLOAT16: "bf16"}[dtype] in kv.ptx


def test_kernels_of_wide_heads_fit_into_the_shared_memory_of_consumer_gpus() -> None:
    from ditc.export.graph.ops.rotary_linear_attention.ptx import compile_pair

    # 99 KiB per block from sm86 on (CUDA programming guide, "Technical Specifications per Compute Capability").
    assert max(kernel.shared_bytes for kernel in compile_pair(DType.FLOAT16, 112)) <= 99 * 1024


def test_the_launcher_covers_every_token_once_and_stays_inside_its_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ditc.export.graph.ops.relu_linear_attention.ptx import pair_as_json

    launches: list[tuple[str, tuple[int, int], tuple[Any, ...]]] = []
    monkeypatch.setattr(
        PtxKernel, "launch", lambda self, grid, args, stream: launches.append((self.name, grid, args))
    )
    launcher = Launcher(1e-15, pair_as_json(DType.FLOAT16, 32))
    batch, tokens, heads = 2, 1030, 3
    launcher.launch((batch, tokens, heads, 32), (1 << 20, 2 << 20, 3 << 20), 4 << 20, 5 << 20, 0)
    (kv, kv_grid, kv_args), (out, out_grid, out_args) = launches
    assert (kv, kv_grid) == ("kv_kernel", (3, 6)) and (out, out_grid) == ("out_kernel", (17, 6))
    assert kv_args[:2] == (2 << 20, 3 << 20) and kv_args[4:] == (tokens, heads, SHARE)
    assert out_args[0] == 1 << 20 and out_args[3] == 4 << 20 and out_args[4:] == (tokens, heads, 3, 1e-15)
    assert kv_args[2:4] == out_args[1:3] and all(isinstance(a, Pointer) for a in kv_args[:4])
    sums, totals = kv_args[2:4]
    needed = batch * heads * 3 * 32 * 33 * 4
    assert totals - sums == batch * heads * 3 * 32 * 32 * 4
    assert launcher.workspace_bytes(batch, tokens, heads) == needed

    launches.clear()
    launcher.launch((batch, tokens, heads, 32), (1, 2, 3, 11, 12), 4, 5, 0)  # with tables
    (_, _, kv_args), (_, _, out_args) = launches
    assert kv_args[:4] == (2, 3, 11, 12) and out_args[:3] == (1, 11, 12)
    assert all(isinstance(a, Pointer) for a in (*kv_args[:6], *out_args[:6]))


def test_a_target_older_than_the_kernels_is_refused_before_the_build(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason='tensorrt-rtx is not installed: pip install "ditc[rtx]"')
    from ditc.export.engine.build import build_engine
    from ditc.runtime.bundle.manifest import load_manifest
    from ditc.runtime.spec import DENOISER, Backend

    artifact = load_manifest(tiny_bundle).stages[DENOISER].artifacts[0]
    path, targets = tiny_bundle / artifact.file.path, ("sm75", "sm89")
    with pytest.raises(BuildError, match="denoiser: sm75 cannot run the linear-attention plugin"):
        build_engine(
            path,
            tmp_path / "engine",
            spec=artifact.spec,
            backend=Backend.TENSORRT_RTX,
            targets=targets,
            linear_attention="plugin",
        )


def test_kernels_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(SessionError, match="plugin's kernels cannot be read"):
        Launcher(1e-15, '{"dtype": "float16"}')


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditc.export.graph.ops import relu_linear_attention as package
    from ditc.export.graph.ops.relu_linear_attention import ptx

    monkeypatch.delattr(package, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "ditc.export.graph.ops.relu_linear_attention.kernels", None)
    with pytest.raises(MissingExtra) as caught:
        ptx.load_kernels()
    assert "ditc[plugin]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("kind", "form", "op"),
    [
        ("tiny_bundle", "decomposed", None),
        ("tiny_bundle", "plugin", b"ReluLinearAttention"),
        ("video_bundle", "plugin", b"RotaryLinearAttention"),
    ],
)
def test_the_parser_takes_the_form_that_was_asked_for(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, form: str, op: bytes | None
) -> None:
    """The build has a process of its own: the library reads LD_LIBRARY_PATH at start and aborts without the link."""
    pytest.importorskip("tensorrt_rtx", reason='tensorrt-rtx is not installed: pip install "ditc[rtx]"')
    bundle, script = request.getfixturevalue(kind), Path(__file__).with_name("parsed.py")
    command = [sys.executable, str(script), str(bundle), form, str(tmp_path / "engine")]
    environment = environment_with_link(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["plugins"] == (2 if form == "plugin" else 0)  # layers of the checkpoint
    engine = (tmp_path / "engine").read_bytes()
    assert (b".visible .entry kv_kernel" in engine) == (form == "plugin")
    assert {name.encode() for name in NAMES if name.encode() in engine} == ({op} if op else set())
