"""No command contains the path of a file that another module owns. It gets the path from that module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditc.export.build import layout
from ditc.export.quant import measure, record
from ditc.runtime import weight_map
from ditc.runtime.bundle import build_cost, certificate, manifest, signature

ROOT = Path(__file__).parents[1]
PARTS = ("runtime/commands", "export/commands", "parity/commands", "calib/commands", "benchmarks")
NAMES = (
    build_cost.FOLDER,
    certificate.CERTIFICATE,
    manifest.MANIFEST,
    signature.SIGNATURE,
    measure.FILE,
    record.SUFFIX,
    weight_map.SUFFIX,
)
FOLDERS = (layout.GRAPHS, layout.ENGINES, layout.GOLDEN)
# A benchmark's own result file, which has the same name as a file in bundles.
OWN = {"benchmarks/quantized.py": {"quantized.json"}}


def documentation(tree: ast.AST) -> Iterator[ast.AST]:
    """The docstrings of a module, which may name files for readers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def spelled(source: str) -> set[str]:
    """Strings of a module's code that are private paths, or begin or end with one."""
    tree = ast.parse(source)
    skipped = set(documentation(tree))
    operands = {
        side
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        for side in (node.left, node.right)
    }
    found = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)) or node in skipped:
            continue
        text = node.value
        a_name = any(text.endswith(n) or text.startswith(f"{n}/") or f"/{n}/" in text for n in NAMES)
        # "onnx" is also a package: it is a folder only if a path is joined with it.
        a_folder = any(text.startswith(f"{f}/") or (text == f and node in operands) for f in FOLDERS)
        if a_name or a_folder:
            found.add(text)
    return found


@pytest.mark.parametrize("part", PARTS)
def test_a_command_spells_no_private_path(part: str) -> None:
    paths = sorted((ROOT / part).glob("*.py"))
    assert paths
    found = {}
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        found[name] = spelled(path.read_text(encoding="utf-8")) - OWN.get(name, set())
    assert not {name: texts for name, texts in found.items() if texts}


def test_the_check_sees_a_path_in_code_and_not_in_a_docstring() -> None:
    assert spelled('"""Reads manifest.json."""\npath = bundle / "manifest.json"') == {"manifest.json"}
    assert spelled('path = bundle / ".build" / name') == {".build"}
    assert spelled('name = f"{graph}.weights.json"') == {".weights.json"}
    assert spelled('paths = (bundle / "golden").glob("*")') == {"golden"}
    assert not spelled(
        '"""About certificate.json."""\nnames = ("onnx", "torch")\nhint = "see the golden values"'
    )
