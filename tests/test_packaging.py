"""The wheel holds every module and nothing else, and it draws a picture without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("runtime", "export", "parity", "calib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Blocks the packages that a machine which only draws does not have.
BLOCKED = ("torch", "transformers", "diffusers", "onnx", "onnxscript", "onnx_ir", "safetensors", "accelerate")
GUARD = f"""
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Guard())
"""


def subpackages() -> set[str]:
    """The package name under which each folder with Python files is installed."""
    found = set()
    for part in PARTS:
        for file in (ROOT / part).rglob("*.py"):
            found.add("ditc." + ".".join(file.parent.relative_to(ROOT).parts))
    return found


def test_the_list_of_packages_is_the_tree() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == subpackages()


def test_no_tool_skips_a_folder_of_ours() -> None:
    """pytest and ruff skip folders named build, dist and venv unless they are told otherwise."""
    folders = {path.name for part in (*PARTS, "tests") for path in (ROOT / part).rglob("*") if path.is_dir()}
    folders -= {"__pycache__"}
    for tool, setting in (("pytest", "norecursedirs"), ("ruff", "exclude")):
        options = PROJECT["tool"][tool].get("ini_options", PROJECT["tool"][tool])
        skipped = {name for name in folders for pattern in options[setting] if fnmatch(name, pattern)}
        assert not skipped, f"{tool} skips {sorted(skipped)}"


def test_make_setup_makes_the_links_that_mypy_and_editors_follow(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for part in PARTS:
        (tmp_path / part).mkdir()
    planned = subprocess.run(
        ["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    subprocess.run(["make", "types"], cwd=tmp_path, check=True)
    links = tmp_path / PROJECT["tool"]["mypy"]["mypy_path"] / "ditc"
    assert ".types/ditc" in planned.stdout
    assert {link.name: link.resolve() for link in links.iterdir()} == {p: tmp_path / p for p in PARTS}
    assert PROJECT["tool"]["mypy"]["mypy_path"] in PROJECT["tool"]["pyright"]["extraPaths"]


def test_the_runtime_alone_asks_for_no_training_library() -> None:
    names = {line.split(">")[0].split("=")[0].strip() for line in PROJECT["project"]["dependencies"]}
    assert not names & {"torch", "transformers", "diffusers", "onnx", "accelerate"}
    assert {"numpy", "onnxruntime", "tokenizers", "pillow", "rich"} <= names


def test_every_pinned_requirement_is_in_the_constraints() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    names = {line.split("==")[0].lower() for line in pinned.splitlines() if "==" in line}
    wanted = {
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnxscript",
        "onnx-ir",
        "onnxruntime",
        "polygraphy",
    }
    assert wanted <= names


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the source, so that no stale build/ folder gets into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PARTS, "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(
            path, source / name
        )
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        "ditc/" + path.relative_to(ROOT).as_posix()
        for part in PARTS
        for path in (ROOT / part).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert {name for name in files if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in files} == {"ditc"}, "no generic top-level name is installed"
    assert "ditc/runtime/py.typed" in files
    assert {"ditc/runtime/serving/ui/page.css", "ditc/runtime/serving/ui/page.js"} <= files


def test_the_wheel_draws_a_picture_where_torch_cannot_be_imported(
    wheel: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """The unpacked wheel shadows the editable install; exporter libraries are blocked."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    output = tmp_path / "out.png"
    code = f"""{GUARD}
import ditc.runtime.cli as cli
assert cli.__file__.startswith({str(tmp_path)!r}), cli.__file__
assert cli.main(["run", {str(tiny_bundle)!r}, "red cat", "-o", {str(output)!r}, "--seed", "3"]) == 0
assert cli.main(["build", "x", "-o", "y"]) == 2
"""
    # -I ignores the user's site. An editable install is found only after sys.path, so the unpacked wheel is used.
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert output.is_file()
    assert 'hint: pip install "ditc[export]"' in done.stderr


@pytest.mark.slow
def test_the_wheel_installs_and_draws_in_an_empty_environment(
    wheel: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """A user of a bundle runs pip install and ditc run. This needs a package index."""
    venv.create(tmp_path / "env", with_pip=True)
    bin_ = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([bin_ / "pip", "install", "--quiet", *constraints, str(wheel)], check=True, timeout=900)
    installed = subprocess.run(
        [bin_ / "pip", "list"], check=True, capture_output=True, text=True
    ).stdout.lower()
    assert not {line.split()[0] for line in installed.splitlines() if line} & set(BLOCKED)
    output = tmp_path / "out.png"
    command = [bin_ / "ditc", "run", str(tiny_bundle), "red cat", "-o", str(output), "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert output.is_file()
    refused = subprocess.run(
        [bin_ / "ditc", "build", "x", "-o", "y"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 2 and 'hint: pip install "ditc[export]"' in refused.stderr
