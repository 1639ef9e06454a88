"""Code outside of the families' folders names no family, neither in an identifier nor in a string.

Docstrings and comments may name families, because they cite sources and measurements.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditc.export.families import FAMILIES

ROOT = Path(__file__).parents[3]
# Each family's label and folder, and the names of publishers and the spellings in diffusers.
NAMES = {name for family in FAMILIES for name in (family.label, family.folder)} | {
    "nvlabs",
    "stability",
    "stablediffusion",
}
# Files outside of the folders that may name a family: its module in parity/reference/, if it has one.
OWN = {ROOT / "parity" / "reference" / f"{family.folder}.py" for family in FAMILIES}


def sources() -> list[Path]:
    """The modules outside of the families' folders, except the runtime's, which test_imports.py covers."""
    files = [path for part in ("export", "parity", "calib") for path in (ROOT / part).rglob("*.py")]
    inside = ROOT / "export" / "families"
    return sorted(path for path in files if inside not in path.parents and path not in OWN)


def named(source: str) -> Iterator[str]:
    """The identifiers and strings of the source that contain a family's name."""
    for word in _words(ast.parse(source)):
        if any(name in word.lower() for name in NAMES):
            yield word


def _words(tree: ast.Module) -> Iterator[str]:
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and node not in docstrings:
                yield node.value
            continue
        # Names, attributes, arguments, keywords, definitions and imports are plain strings in their nodes.
        for _, value in ast.iter_fields(node):
            yield from (
                word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)
            )


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_family_is_named_in_code_outside_of_its_folder(path: Path) -> None:
    assert not list(named(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "leak",
    [
        "from ditc.export.families.sana.recipe import RECIPES",
        "import ditc.parity.reference.lucidrains",
        "SD3_LAYERS = ()",
        "def is_sana(): ...",
        "class MMDiT: ...",
        "x.sana",
        "f(sd3=1)",
        "def f(sana): ...",
        "global sana_count",
        "kind = 'SanaTransformer2DModel'",
        "text = f'{name} is no SD3 network'",
        "match kind:\n    case 'sana': pass",
    ],
)
def test_a_name_is_found_wherever_code_may_have_it(leak: str) -> None:
    assert list(named(leak))


@pytest.mark.parametrize("citation", ['"""As Sana has it (arXiv 2410.10629)."""', "x = 1  # SD3: 2"])
def test_a_citation_is_allowed(citation: str) -> None:
    assert not list(named(citation))
