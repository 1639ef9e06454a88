"""Hashes of ditc's own source. They replace version numbers that someone could forget to raise.

Files that shape a graph or an engine are hashed as code: comments, docstrings and formatting do not count, so editing
them rebuilds nothing. The text of a syntax tree may differ between versions of Python, so the first build under a new
Python version rebuilds everything. This module does not import torch.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The code that decides the bytes of a stage's graph, weight map and golden file, and how a checkpoint is read. The
# runtime's files in this list define the step's tensors and columns, the weight map and the specs.
GRAPH_SOURCES = (
    "export/families",
    "export/networks",
    "export/graph",
    "export/quant",
    "export/checkpoint",
    "export/contract.py",
    "export/example_inputs.py",
    "export/build/golden.py",
    "export/build/latent_rgb.py",
    "export/build/weights.py",
    "export/convert/key_map.py",
    "runtime/lora/lora.py",
    "runtime/lora/lora_file.py",
    "runtime/lora/metadata.py",
    "runtime/lora/names.py",
    "runtime/step_contract.py",
    "runtime/weight_map.py",
    "runtime/spec.py",
)
# Files in those folders that no graph depends on: the table of families; the conversion of native files; recipes, whose
# content is already in the key of the stage that they quantize; what ranges rest on; and the comparison of finished
# graphs.
NOT_IN_GRAPHS = (
    "export/families/__init__.py",
    "export/families/*/convert.py",
    "export/families/*/*native.py",
    "export/families/*/recipe.py",
    "export/quant/evidence.py",
    "export/quant/measure.py",
)
# The code that decides an engine's bytes besides its graph: the engine builder, and what the plugin stores in it.
ENGINE_SOURCES = ("export/engine", "runtime/plugins/linear_attention.py")
# The command line only prints, so it does not shape a bundle.
NOT_IN_BUNDLES = ("export/commands/*.py",)


@cache
def graph_source(root: Path = ROOT) -> str:
    """The hash of the code that shapes a stage's graph."""
    return _hash(source_files(GRAPH_SOURCES, but=NOT_IN_GRAPHS, root=root), root, code_of)


@cache
def engine_source(root: Path = ROOT) -> str:
    """The hash of the code that makes an engine from a graph."""
    return _hash(source_files(ENGINE_SOURCES, root=root), root, code_of)


@cache
def bundle_source(root: Path = ROOT) -> str:
    """The hash of the text of all files that may shape a bundle.

    Hashing text takes 10 ms, hashing code half a second. This hash only decides whether a build compares the inputs of
    its stages, so an edited comment costs that comparison and rebuilds nothing.
    """
    files = source_files(("export", "runtime"), but=NOT_IN_BUNDLES, root=root)
    return _hash(files, root, lambda source: source)


def source_files(names: Iterable[str], *, but: tuple[str, ...] = (), root: Path = ROOT) -> list[Path]:
    """The named Python files and those in the named folders, except files that match a pattern of `but`."""
    named = (root / name for name in names)
    files = (file for path in named for file in (path.rglob("*.py") if path.is_dir() else (path,)))
    return sorted(path for path in files if not any(path.match(pattern) for pattern in but))


def code_of(source: bytes) -> bytes:
    """The source's syntax tree as text, without docstrings. A syntax tree has no comments and no formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [child for child in node.body if not _is_docstring(child)]
    return ast.dump(tree).encode()


def _hash(files: Iterable[Path], root: Path, what: Callable[[bytes], bytes]) -> str:
    """The hash of the files' names below root, and of what `what` returns for each file's content."""
    hasher = hashlib.sha256()
    for path in files:
        name = path.relative_to(root).as_posix().encode()
        hasher.update(name + b"\0" + what(path.read_bytes()) + b"\0")
    return hasher.hexdigest()


def _is_docstring(node: ast.stmt) -> bool:
    """Whether the statement is only a string. Such a statement does nothing, wherever in a body it stands."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
