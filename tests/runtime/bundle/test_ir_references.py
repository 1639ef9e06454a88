"""OpenVINO's files may refer only to bytes of their own file of weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ditc.runtime.bundle.ir_references import ir_references
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.bundle.references import check_references
from ditc.runtime.errors import BundleError
from ditc.runtime.spec import Backend

CONST = '<layer id="0" name="{}" type="Const"><data element_type="f32" offset="{}" size="{}"/></layer>'


def written(folder: Path, layers: str) -> Path:
    path = folder / "stage.xml"
    path.write_text(f'<?xml version="1.0"?><net name="g" version="11"><layers>{layers}</layers></net>')
    return path


def test_constants_are_found_also_in_subgraphs(tmp_path: Path) -> None:
    body = f'<layer id="1" name="loop" type="Loop"><body><layers>{CONST.format("inner", 8, 4)}</layers></body></layer>'
    found = ir_references(written(tmp_path, CONST.format("outer", 0, 8) + body))
    assert [(r.owner, r.location, r.offset, r.length) for r in found] == [
        ("the constant 'outer'", "stage.bin", 0, 8),
        ("the constant 'inner'", "stage.bin", 8, 4),
    ]


def test_every_constant_of_a_real_file_is_within_its_weights(openvino_bundle: Path) -> None:
    for stage in load_manifest(openvino_bundle).stages.values():
        artifact = next(a for a in stage.artifacts if a.backend is Backend.OPENVINO)
        path = openvino_bundle / artifact.file.path
        check_references(path, artifact)
        assert len(ir_references(path)) == path.read_text().count('type="Const"')
        (weights,) = artifact.data
        for data in ((), (replace(weights, size_bytes=weights.size_bytes - 1),)):
            with pytest.raises(BundleError, match=r"does not list|but the file has"):
                check_references(path, replace(artifact, data=data))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no XML",
        "<html></html>",
        '<!DOCTYPE net [<!ENTITY a "b">]><net>&a;</net>',
        f"<net>{CONST.format('x', -1, 4)}</net>",
        f"<net>{CONST.format('x', 0, '9' * 30)}</net>",
        '<net><layer name="x" type="Const"><data/></layer></net>',
        "<net>",
    ],
)
def test_what_is_not_such_a_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stage.xml"
    path.write_text(text)
    with pytest.raises(BundleError, match="is not an IR file that ditc opens"):
        ir_references(path)
