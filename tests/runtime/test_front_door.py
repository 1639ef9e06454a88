"""`from ditc.runtime import Pipeline`: the exported names, and that importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import ditc.runtime
from ditc.runtime import version

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "onnxruntime", "PIL", "tokenizers", "rich")


def test_all_is_sorted_and_holds_what_programs_need() -> None:
    names = ditc.runtime.__all__
    assert names == sorted(names, key=str.casefold)
    assert {"Pipeline", "Request", "Generator", "DitcError", "__version__"} <= set(names)


def test_type_checkers_and_the_interpreter_see_the_same_names() -> None:
    """Checkers read the imports, the interpreter the table of modules, and `import *` the list."""
    tree = ast.parse(Path(ditc.runtime.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    checked = {
        alias.name: (node.module or "").removeprefix("ditc.runtime.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked == ditc.runtime._MODULES
    assert sorted(checked) == sorted(ditc.runtime.__all__)


@pytest.mark.parametrize("name", ditc.runtime.__all__)
def test_every_name_is_the_object_of_its_own_module(name: str) -> None:
    home = importlib.import_module(f"ditc.runtime.{ditc.runtime._MODULES[name]}")
    assert getattr(ditc.runtime, name) is getattr(home, name)
    assert name in dir(ditc.runtime)


def test_type_checkers_know_the_names_and_refuse_others(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "ditc").mkdir()
    (tmp_path / "ditc" / "runtime").symlink_to(ROOT / "runtime", target_is_directory=True)
    code = f"from ditc.runtime import {', '.join(ditc.runtime.__all__)}\nreveal_type(Pipeline.load)\n"
    code += "from ditc.runtime import Pipelin\n"
    command = [sys.executable, "-m", "mypy", "--strict", "--explicit-package-bases", "--config-file="]
    done = subprocess.run(
        [*command, "--ignore-missing-imports", "--cache-dir", str(tmp_path / "cache"), "-c", code],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    problems = [
        line for line in done.stdout.splitlines() if line.startswith("<string>") and ": error: " in line
    ]
    assert len(problems) == 1 and '"Pipelin"' in problems[0], done.stdout + done.stderr
    assert "-> ditc.runtime.pipeline.Pipeline" in done.stdout


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_runtime_alone_loads_nothing_heavy() -> None:
    code = f"""
import sys, ditc.runtime
assert {set(ditc.runtime.__all__)!r} <= set(dir(ditc.runtime))
from ditc.runtime import DitcError, __version__
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
from ditc.runtime import Pipeline
assert "numpy" in sys.modules, "this test could not detect a heavy import"
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", ["import ditc.runtime as r; r.Pipelin", "from ditc.runtime import Pipelin"])
def test_a_misspelt_name_is_refused(code: str) -> None:
    done = _python(code)
    assert done.returncode == 1
    assert "'Pipelin'" in done.stderr
    if code.endswith("r.Pipelin"):  # Python 3.11 makes no suggestion for an import
        assert "Did you mean: 'Pipeline'?" in done.stderr


def test_the_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ditc.runtime.__version__ == project["version"]


def test_a_source_tree_that_is_not_installed_has_a_version_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nothing_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", nothing_installed)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n', encoding="utf-8")
    assert version.installed_version(tmp_path) == "1.2.3"
    assert version.installed_version(tmp_path / "elsewhere") == "unknown"
