"""Import rules between the parts, checked in the source; and no file under runtime/ names a model family."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each part may import the parts before it.
PARTS = ("runtime", "export", "parity", "calib", "benchmarks")
FORBIDDEN_IN_RUNTIME = {"torch", "transformers", "diffusers", "onnx", "onnxscript", "onnx_ir", "safetensors"}
FAMILIES = re.compile(
    r"sana|gemma|mmdit|sd3|stable.?diffusion|flux|pixart|dc.?ae|autoencoderdc|\bt5\b|hunyuan|qwen|lumina|\bclip_l\b",
    re.IGNORECASE,
)


def sources(part: str) -> list[Path]:
    return sorted(path for path in (ROOT / part).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (
                a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def violations(part: str, names: Iterator[str]) -> list[str]:
    later = {f"ditc.{other}" for other in PARTS[PARTS.index(part) + 1 :]}
    return [name for name in names if any(name == p or name.startswith(f"{p}.") for p in later)]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_the_parts_before_it(part: str) -> None:
    found = {path.relative_to(ROOT).as_posix(): violations(part, imported(path)) for path in sources(part)}
    assert not {path: names for path, names in found.items() if names}


def test_the_check_of_directions_sees_an_import_inside_a_function() -> None:
    tree = "def f():\n    from ditc.export.build import builder\n"
    path = ROOT / "build" / "direction_check.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(tree)
    try:
        assert violations("runtime", imported(path)) == ["ditc.export.build", "ditc.export.build.builder"]
    finally:
        path.unlink()


def test_runtime_imports_no_training_library() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): sorted(
            {name.split(".")[0] for name in imported(path)} & FORBIDDEN_IN_RUNTIME
        )
        for path in sources("runtime")
    }
    assert not {path: names for path, names in found.items() if names}


def test_only_the_table_of_verbs_names_later_parts() -> None:
    from ditc.runtime.cli import VERBS

    allowed = {verb.module for verb in VERBS.values()}
    pattern = re.compile(r"[\"'](ditc\.(?:export|parity|calib)[\w.]*)[\"']")
    found = {
        name for path in sources("runtime") for name in pattern.findall(path.read_text(encoding="utf-8"))
    }
    assert found <= allowed


def test_runtime_names_no_model_family() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources("runtime")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FAMILIES.search(line)
    ]
    assert not found


@pytest.mark.parametrize("path", sources("runtime"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_runtime_calls_nothing_that_only_posix_has(path: Path) -> None:
    posix = {"fcntl", "pwd", "grp", "resource", "termios"}
    if path.name == "open_files.py":
        posix.remove("resource")  # where it is missing, there is no limit to raise
    if path.name == "private_copy.py":
        posix.remove("fcntl")  # private copies are refused on Windows before anything is copied
    assert not {name.split(".")[0] for name in imported(path)} & posix
    assert "os.fork" not in path.read_text(encoding="utf-8")


def loaded_modules(code: str) -> set[str]:
    """Top-level modules in sys.modules after running the code in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stderr.split())


HEAVY = {"numpy", "onnxruntime", "torch", "transformers", "diffusers", "onnx", "PIL", "rich", "tokenizers"}


def test_the_command_starts_without_heavy_modules() -> None:
    """--help answers within 0.3 s because it imports next to nothing. The imports can be checked on any machine."""
    assert not loaded_modules("import ditc.runtime.cli") & HEAVY


def helps_without(verb: str) -> set[str]:
    call = f"main([{verb!r}, '--help'])" if verb else "main(['--help'])"
    return (
        loaded_modules(f"from ditc.runtime.cli import main\ntry:\n    {call}\nexcept SystemExit: pass")
        & HEAVY
    )


@pytest.mark.parametrize("verb", ["", "build", "run", "inspect", "verify", "doctor", "convert"])
def test_help_of_a_verb_imports_nothing_heavy(verb: str) -> None:
    assert not helps_without(verb)


def test_the_runtime_draws_without_the_libraries_of_the_exporter(tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    code = f"""
from ditc.runtime.cli import main
assert main(["run", {str(tiny_bundle)!r}, "red cat", "-o", {str(output)!r}, "--seed", "3"]) == 0
"""
    assert not loaded_modules(code) & FORBIDDEN_IN_RUNTIME
    assert output.is_file()
