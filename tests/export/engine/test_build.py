"""Building TensorRT-RTX engines on a CPU: sizes, targets, types, and errors with hints."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, parser

from ditc.export.engine import build as engine_module
from ditc.export.engine.build import build_engine, estimate_memory_bytes
from ditc.export.engine.targets import check_targets, engine_targets
from ditc.export.engine.tensorrt import Compiler
from ditc.runtime.errors import BuildError, DitcError, MissingExtra, OutputError, UsageError
from ditc.runtime.spec import Backend, DType, Precision, Range, StageSpec, TensorSpec

pytest.importorskip("tensorrt_rtx")

RTX = Backend.TENSORRT_RTX
WIDTH = 64
NUMPY = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DTYPES = {"float": DType.FLOAT32, "float16": DType.FLOAT16, "bfloat16": DType.BFLOAT16}


@pytest.mark.parametrize(("kind", "name"), [("float", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")])
def test_one_file_serves_several_targets_in_every_type(tmp_path: Path, kind: str, name: str) -> None:
    graph = _mlp(tmp_path, kind)
    targets = ("sm80", "sm86", "sm89", "sm120")
    report = build_engine(graph, tmp_path / "net.engine", spec=_spec(kind), backend=RTX, targets=targets)
    assert report.file.read_bytes()[:4] == b"vtrt"  # the library's own magic
    assert report.size_bytes == report.file.stat().st_size
    assert report.targets == targets
    assert name in report.types
    assert report.profiles == (_spec().profile,)
    assert report.version.startswith("1.")
    assert report.seconds > 0
    assert report.peak_memory_bytes > report.size_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.engine", "net.onnx"]


def test_several_targets_in_one_file_cost_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    graph = _mlp(tmp_path, width=512)
    sizes = [
        build_engine(
            graph, tmp_path / "net.engine", spec=_spec(width=512), backend=RTX, targets=targets
        ).size_bytes
        for targets in (("sm86",), ("sm80", "sm86", "sm89", "sm120"))
    ]
    # 1.7.1.116 adds 16 bytes. Three more copies of the weights would add 300 %, far above the limit of 1 %.
    assert sizes[1] < 1.01 * sizes[0]


def test_tf32_is_cleared_unless_it_is_asked_for(tmp_path: Path) -> None:
    graph = _mlp(tmp_path)
    out = tmp_path / "net.engine"
    assert Compiler(RTX)._config.get_flag(Compiler(RTX)._trt.BuilderFlag.TF32)  # the library's default
    assert not build_engine(graph, out, spec=_spec(), backend=RTX, targets=("sm86",)).tf32
    assert build_engine(graph, out, spec=_spec(), backend=RTX, targets=("sm86",), tf32=True).tf32


def test_no_engine_has_the_flag_that_crashes_its_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With REQUIRE_USER_ALLOCATION and a profile of several sizes, execute_async_v3 crashes (TensorRT-RTX 1.7.1)."""
    build, flags = Compiler.build, []

    def spied(compiler: Compiler, file: Any) -> bool:
        flag = compiler._trt.BuilderFlag.REQUIRE_USER_ALLOCATION
        flags.append(compiler._config.get_flag(flag))
        return build(compiler, file)

    monkeypatch.setattr(Compiler, "build", spied)
    build_engine(_mlp(tmp_path), tmp_path / "net.engine", spec=_spec(), backend=RTX, targets=("sm86",))
    assert flags == [False]


def test_every_network_is_strongly_typed() -> None:
    assert Compiler(RTX).strongly_typed


def test_each_profile_overrides_the_ranges_of_the_stage(tmp_path: Path) -> None:
    graph = _mlp(tmp_path)
    bins = [{"N": Range(16, 16, 16)}, {"N": Range(32, 32, 32)}]
    report = build_engine(
        graph, tmp_path / "net.engine", spec=_spec(), backend=RTX, targets=("sm86",), profiles=bins
    )
    assert [profile["N"].max for profile in report.profiles] == [16, 32]
    assert [profile["B"] for profile in report.profiles] == [_spec().profile["B"]] * 2


def test_external_data_is_read_from_beside_the_graph(tmp_path: Path) -> None:
    graph = _mlp(tmp_path, width=256)
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="weights.data", size_threshold=0)
    assert graph.stat().st_size < 10_000
    report = build_engine(
        graph, tmp_path / "net.engine", spec=_spec(width=256), backend=RTX, targets=("sm86",)
    )
    assert report.size_bytes > 2 * 256 * 256 * 4


@pytest.mark.parametrize("kept", [0, 1000])
def test_external_data_that_is_missing_or_short_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    graph = _mlp(tmp_path)
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="weights.data", size_threshold=0)
    data = (tmp_path / "weights.data").read_bytes()
    (tmp_path / "weights.data").write_bytes(data[:kept])
    with pytest.raises(
        BuildError, match=rf"needs {len(data)} bytes of weights in .*weights.data, which has {kept}"
    ):
        build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",))
    assert not (tmp_path / "e").exists()


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    graph = _mlp(tmp_path)
    model = onnx.load(graph)
    onnx.external_data_helper.convert_model_to_external_data(model, location="../secret", size_threshold=0)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(BuildError, match=r"'../secret', outside its folder"):
        build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",))


def test_a_build_takes_no_more_memory_than_was_estimated(tmp_path: Path) -> None:
    graph = _mlp(tmp_path, width=1024)
    before = psutil.Process().memory_info().rss
    report = build_engine(
        graph, tmp_path / "net.engine", spec=_spec(width=1024), backend=RTX, targets=("sm86",)
    )
    taken = report.peak_memory_bytes - before
    # This can only check an upper bound: memory that earlier builds left resident in this process is used again.
    assert taken < 1.2 * estimate_memory_bytes(graph)
    assert estimate_memory_bytes(graph) > 2 * report.size_bytes


def test_a_custom_op_is_built_from_its_function_body(tmp_path: Path) -> None:
    graph = _save(
        tmp_path,
        """<ir_version: 10, opset_import: ["": 20, "ditc": 1]>
        net (float[B, N, 64] x) => (float[B, N, 64] y) { y = ditc.Twice (x) }
        <domain: "ditc", opset_import: ["": 20]> Twice (x) => (y) { y = Add (x, x) }""",
    )
    build_engine(graph, tmp_path / "net.engine", spec=_spec(), backend=RTX, targets=("sm86",))
    assert (tmp_path / "net.engine").is_file()


def test_progress_reports_phase_and_steps_and_can_stop_the_build(tmp_path: Path) -> None:
    graph = _mlp(tmp_path)
    seen: list[tuple[str, int, int]] = []
    build_engine(
        graph,
        tmp_path / "net.engine",
        spec=_spec(),
        backend=RTX,
        targets=("sm86",),
        progress=lambda *event: seen.append(event),
    )
    whole = [event for event in seen if event[0] == "Building engine"]
    assert [step for _, step, _ in whole] == list(range(1, whole[0][2] + 1))

    def stop(phase: str, step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(
            graph, tmp_path / "other.engine", spec=_spec(), backend=RTX, targets=("sm86",), progress=stop
        )
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("target", ["sm90", "sm100", "sm70", "ampere-plus"])
def test_a_target_that_the_library_lacks_is_refused_with_a_hint(tmp_path: Path, target: str) -> None:
    with pytest.raises(UsageError, match=f"tensorrt-rtx cannot build for {re.escape(target)}") as caught:
        build_engine(_mlp(tmp_path), tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86", target))
    assert "--backend tensorrt" in str(caught.value.hint)
    assert not (tmp_path / "e").exists()


def test_targets_are_checked_against_the_precision_before_any_work() -> None:
    check_targets(RTX, engine_targets(RTX), Precision.INT8)
    check_targets(RTX, ("sm89", "sm120"), Precision.FP8)
    check_targets(Backend.TENSORRT, ("ampere-plus",), Precision.FP8)
    with pytest.raises(BuildError, match=r"sm75, sm86 cannot run fp8") as caught:
        check_targets(RTX, ("sm75", "sm86", "sm89"), Precision.FP8)
    assert "build fp8 for sm89, sm120, sm121" in str(caught.value.hint)
    with pytest.raises(BuildError, match=r"sm75 cannot run bf16"):
        check_targets(RTX, ("sm75",), Precision.BF16)
    with pytest.raises(UsageError, match=r"onnxruntime builds no engines"):
        check_targets(Backend.ONNXRUNTIME, ("sm86",), Precision.FP32)
    with pytest.raises(UsageError, match=r"no target"):
        check_targets(RTX, (), Precision.FP32)
    with pytest.raises(UsageError, match=r"one target at a time"):
        check_targets(Backend.TENSORRT, ("this-gpu", "ampere-plus"), Precision.FP32)


def test_the_targets_are_those_of_the_installed_library() -> None:
    import tensorrt_rtx

    names = set(tensorrt_rtx.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert {name.lower() for name in names} == set(engine_targets(RTX))


def test_an_element_type_that_a_target_lacks_is_found_in_the_graph(tmp_path: Path) -> None:
    graph = _mlp(tmp_path, "bfloat16")
    with pytest.raises(BuildError, match=r"sm75 cannot run bf16"):
        build_engine(graph, tmp_path / "e", spec=_spec("bfloat16"), backend=RTX, targets=("sm75",))


def test_fp8_builds_where_the_hardware_has_it_and_is_refused_elsewhere(tmp_path: Path) -> None:
    graph = _quantized(tmp_path, TensorProto.FLOAT8E4M3FN)
    report = build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm89", "sm120"))
    assert "fp8" in report.types
    with pytest.raises(BuildError, match=r"sm86 cannot run fp8"):
        build_engine(graph, tmp_path / "e2", spec=_spec(), backend=RTX, targets=("sm86", "sm89"))
    assert not (tmp_path / "e2").exists()


def test_int8_builds_from_sm80_on_and_for_sm75_only_what_has_no_fp32_gemm(tmp_path: Path) -> None:
    graph = _quantized(tmp_path, TensorProto.INT8)
    targets = tuple(target for target in engine_targets(RTX) if target != "sm75")
    assert "int8" in build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=targets).types
    with pytest.raises(BuildError, match=r"FP32 GEMM is not supported") as caught:
        build_engine(_mlp(tmp_path), tmp_path / "e2", spec=_spec(), backend=RTX, targets=("sm75",))
    assert "leave sm75 out" in str(caught.value.hint)
    assert "cudaError" not in str(caught.value)
    half = _mlp(tmp_path, "float16")
    build_engine(half, tmp_path / "e3", spec=_spec("float16"), backend=RTX, targets=("sm75",))
    with pytest.raises(BuildError, match=r"sm75 cannot run fp32"):
        check_targets(RTX, ("sm75", "sm86"), Precision.FP32)


def test_what_the_table_of_types_misses_the_library_refuses_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "check_types", lambda targets, types: None)
    with pytest.raises(BuildError, match=r"denoiser: .* HW-specific datatypes: fp8") as caught:
        build_engine(
            _quantized(tmp_path, TensorProto.FLOAT8E4M3FN),
            tmp_path / "e",
            spec=_spec(),
            backend=RTX,
            targets=("sm86",),
        )
    assert "fewer targets" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_broken_graph_is_refused_with_its_node_and_the_librarys_words(tmp_path: Path) -> None:
    graph = _save(
        tmp_path,
        """<ir_version: 10, opset_import: ["": 20]>
        net (float[B, N, 64] x) => (float[B, N, 64] y)
        <float[3] w = {1, 2, 3}> { [blocks_3_add] y = Add (x, w) }""",
    )
    with pytest.raises(BuildError, match=r"denoiser: .*blocks_3_add.*broadcast") as caught:
        build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",))
    assert caught.value.hint


def test_an_unknown_op_is_refused_with_what_to_do(tmp_path: Path) -> None:
    graph = _save(
        tmp_path,
        """<ir_version: 10, opset_import: ["": 20, "foreign": 1]>
        net (float[B, N, 64] x) => (float[B, N, 64] y) { [blocks_0] y = foreign.Bar (x) }""",
    )
    with pytest.raises(BuildError, match=r"blocks_0 \(Bar\).*Plugin not found") as caught:
        build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",))
    assert "function bodies" in str(caught.value.hint)


def test_a_file_that_is_not_onnx_and_one_that_is_missing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"not a graph")
    for name in ("net.onnx", "other.onnx"):
        with pytest.raises(BuildError, match=name):
            build_engine(tmp_path / name, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",))


def test_a_graph_of_another_stage_is_refused(tmp_path: Path) -> None:
    graph = _mlp(tmp_path)
    with pytest.raises(BuildError, match=r"has x \[-1, -1, 64\], but the stage's spec has \['B', 'N', 65\]"):
        build_engine(graph, tmp_path / "e", spec=_spec(width=65), backend=RTX, targets=("sm86",))
    other = StageSpec("denoiser", (TensorSpec("z", DType.FLOAT32, ("B",)),), (), {"B": Range(1, 1, 1)})
    with pytest.raises(BuildError, match=r"has inputs \['x'\], but the stage's spec has \['z'\]"):
        build_engine(graph, tmp_path / "e", spec=other, backend=RTX, targets=("sm86",))


def test_ranges_that_are_missing_or_upside_down_are_refused(tmp_path: Path) -> None:
    graph = _mlp(tmp_path)
    spec = StageSpec("denoiser", _spec().inputs, (), {"B": Range(1, 1, 2)})
    with pytest.raises(BuildError, match=r"input x has dimension 'N' without a range"):
        build_engine(graph, tmp_path / "e", spec=spec, backend=RTX, targets=("sm86",))
    upside_down = [{"N": Range(64, 32, 16)}]
    with pytest.raises(BuildError, match=r"refuses the sizes") as caught:
        build_engine(
            graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",), profiles=upside_down
        )
    assert "min <= opt <= max" in str(caught.value.hint)


def test_refit_without_a_gpu_says_that_it_needs_one(tmp_path: Path) -> None:
    graph, names = _mlp(tmp_path), ("w0", "w1")
    try:
        build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",), refit=names)
    except BuildError as error:
        assert "need a GPU" in str(error.hint)
        assert not (tmp_path / "e").exists()


def test_a_weight_that_the_network_does_not_have_cannot_stay_replaceable(tmp_path: Path) -> None:
    graph, names = _mlp(tmp_path), ("w0", "other")
    with pytest.raises(BuildError, match=r"cannot keep other replaceable.*1 of 2 are missing"):
        build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",), refit=names)


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, out = _mlp(tmp_path), tmp_path / "e"

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"cannot write .*No space left"):
        build_engine(graph, out, spec=_spec(), backend=RTX, targets=("sm86",))
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_disk_that_is_too_small_is_refused_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = _mlp(tmp_path)
    monkeypatch.setattr(engine_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(BuildError, match=r"0 MiB free"):
        build_engine(graph, tmp_path / "e", spec=_spec(), backend=RTX, targets=("sm86",))


def test_a_library_that_is_not_installed_is_named_with_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtra) as caught:
        build_engine(
            _mlp(tmp_path),
            tmp_path / "e",
            spec=_spec(),
            backend=Backend.TENSORRT,
            targets=("this-gpu",),
        )
    assert caught.value.hint == 'pip install "ditc[tensorrt]"'
    assert isinstance(caught.value, DitcError)


def _spec(kind: str = "float", width: int = WIDTH) -> StageSpec:
    tensor = TensorSpec("x", DTYPES[kind], ("B", "N", width))
    output = TensorSpec("y", DTYPES[kind], ("B", "N", width))
    return StageSpec("denoiser", (tensor,), (output,), {"B": Range(1, 2, 2), "N": Range(16, 64, 256)})


def _mlp(directory: Path, kind: str = "float", width: int = WIDTH) -> Path:
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 20]>
        net ({kind}[B, N, {width}] x) => ({kind}[B, N, {width}] y)
        {{ h = MatMul (x, w0)  r = Relu (h)  y = MatMul (r, w1) }}"""
    )
    rng = np.random.default_rng(0)
    for name in ("w0", "w1"):
        values = rng.standard_normal((width, width)).astype(NUMPY[kind])
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, directory / "net.onnx")
    return directory / "net.onnx"


def _quantized(directory: Path, kind: int) -> Path:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        net (float[B, N, 64] x) => (float[B, N, 64] y)
        <float scale = {0.25}>
        {
            x8 = QuantizeLinear (x, scale, zero)  xd = DequantizeLinear (x8, scale, zero)
            w8 = QuantizeLinear (w, scale, zero)  wd = DequantizeLinear (w8, scale, zero)
            y = MatMul (xd, wd)
        }"""
    )
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.helper.make_tensor("w", TensorProto.FLOAT, (64, 64), values.ravel()))
    model.graph.initializer.append(onnx.helper.make_tensor("zero", kind, (), [0]))
    onnx.save(model, directory / "net.onnx")
    return directory / "net.onnx"


def _save(directory: Path, text: str) -> Path:
    onnx.save(parser.parse_model(text), directory / "net.onnx")
    return directory / "net.onnx"
