"""`ditc build --backend openvino`: files are written beside the graphs, reused, and refused with a reason."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from ditc.export.build.noop import up_to_date
from ditc.export.build.preflight import check_options
from ditc.export.engine import ir
from ditc.export.engine.ir import write_ir
from ditc.export.options import BuildOptions
from ditc.runtime.bundle.integrity import check_bundle
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import BuildError, MissingExtra, SessionError, UsageError
from ditc.runtime.spec import DENOISER, Backend, Precision

OPENVINO = BuildOptions(backend=Backend.OPENVINO)


def test_every_stage_gets_its_files_from_the_graph_that_is_there(
    openvino_bundle: Path, tiny_bundle: Path
) -> None:
    before, after = load_manifest(tiny_bundle), load_manifest(openvino_bundle)
    check_bundle(openvino_bundle, after)
    for name, stage in after.stages.items():
        graph, made = stage.artifacts
        assert graph == before.stages[name].artifacts[0]
        assert (made.backend, made.spec, made.targets, made.gpu) == (Backend.OPENVINO, graph.spec, (), None)
        assert made.library and made.file.path.endswith(".openvino.xml")
        assert [ref.path for ref in made.data] == [made.file.path.replace(".xml", ".bin")]
        text = (openvino_bundle / made.file.path).read_text()
        assert str(Path.home()) not in text and "/tmp" not in text


def test_a_second_build_does_nothing(openvino_bundle: Path, tiny_checkpoint: Path) -> None:
    report = up_to_date(tiny_checkpoint, openvino_bundle, OPENVINO)
    assert report is not None and {event.status for event in report.events} == {"reused"}
    assert sum(event.stage.endswith(" openvino") for event in report.events) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": Precision.FP16}, "precision fp16 is not made for openvino"),
        ({"precision": Precision.INT8, "base_precision": Precision.FP16}, "precision fp16 is not made"),
        ({"opset": 23}, "opset 23 is not made for openvino"),
        ({"targets": ("sm86",)}, "--targets sm86 is an option of engines"),
        ({"weight_streaming": True}, "--weight-streaming is an option of engines"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(BuildOptions(backend=Backend.OPENVINO, **options))


def test_outside_of_the_8_bit_products_the_default_is_bf16() -> None:
    assert BuildOptions(backend=Backend.OPENVINO, precision=Precision.INT8).base is Precision.BF16
    assert BuildOptions(precision=Precision.INT8).base is Precision.FP32


@pytest.mark.parametrize(
    ("lack", "error"),
    [("OpenVINO is not installed: x", MissingExtra), ("OpenVINO 1 is too old: x", SessionError)],
)
def test_a_missing_or_old_package_is_found_before_the_build(
    monkeypatch: pytest.MonkeyPatch, lack: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(ir, "missing", lambda backend: lack)
    with pytest.raises(error):
        check_options(OPENVINO)


def test_a_graph_that_openvino_cannot_read_is_one_line(tmp_path: Path, tiny_bundle: Path) -> None:
    spec = load_manifest(tiny_bundle).stages[DENOISER].artifacts[0].spec
    header = '<ir_version: 9, opset_import: ["" : 20, "ours" : 1]>'
    text = f"{header} g (float[N] x) => (float[N] y) {{ y = ours.Unheard (x) }}"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    with pytest.raises(BuildError, match=r"denoiser: OpenVINO .* cannot read .*Unheard"):
        write_ir(tmp_path / "g.onnx", tmp_path / "g.xml", spec=spec)
    assert not (tmp_path / "g.xml").exists()
