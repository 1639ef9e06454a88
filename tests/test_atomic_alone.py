"""Only runtime/atomic.py moves temporary files: every other module asks it to."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from ditc.runtime.atomic import SUFFIX

ROOT = Path(__file__).parents[1]
TEMPORARY = re.compile(re.escape(SUFFIX) + r"\b(?!_)")  # not OpenAI's image_generation.partial_image


def by_hand(source: str) -> list[str]:
    """Calls and names in a source text that only runtime/atomic.py may contain, with line numbers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and TEMPORARY.search(node.value):
            found.append(f"{node.lineno}: {node.value!r}")
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        module, attribute = ast.unparse(node.func.value), node.func.attr
        of_os = module in ("os", "shutil") and attribute in ("replace", "rename", "move", "umask")
        # str.replace takes two arguments; dataclasses.replace and datetime.replace take names.
        of_path = attribute in ("replace", "rename") and len(node.args) == 1 and not node.keywords
        if of_os or of_path:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("part", ["runtime", "export", "parity", "calib", "benchmarks", "demo"])
def test_no_other_module_moves_temporary_files(part: str) -> None:
    sources = [path for path in (ROOT / part).rglob("*.py") if path != ROOT / "runtime" / "atomic.py"]
    assert sources
    found = {path.relative_to(ROOT).as_posix(): by_hand(path.read_text(encoding="utf-8")) for path in sources}
    assert not {path: lines for path, lines in found.items() if lines}


def test_the_check_finds_moves_and_temporary_names() -> None:
    assert by_hand("os.replace(partial, path)") and by_hand("partial.replace(path)")
    assert by_hand("temporary.rename(out)") and by_hand("mask = os.umask(0)")
    assert by_hand('path.with_name(f"{path.name}.{os.getpid()}.partial")')
    assert not by_hand('replace(spec, name="x"); text.replace("a", "b"); functools.partial(f)')
