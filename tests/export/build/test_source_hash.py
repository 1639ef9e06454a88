"""A change of the code that shapes an artifact rebuilds it. A change of comments or of other code does not."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ditc.export.build.source_hash import (
    ENGINE_SOURCES,
    GRAPH_SOURCES,
    NOT_IN_BUNDLES,
    NOT_IN_GRAPHS,
    ROOT,
    bundle_source,
    code_of,
    engine_source,
    graph_source,
    source_files,
)

GRAPH_FILES = source_files(GRAPH_SOURCES, but=NOT_IN_GRAPHS)
ENGINE_FILES = source_files(ENGINE_SOURCES)
# Files that hashed files import and that need not be hashed, each with its reason. A new import must be hashed, or
# reviewed and added here.
REVIEWED = {
    "runtime/errors.py": "messages",
    "runtime/limits.py": "the largest numbers that are accepted",
    "runtime/tokenizer_json.py": "refuses tokenizers that could fill the memory",
    "runtime/sessions/registry.py": "targets and library versions, which are in an engine's key",
    "runtime/sessions/tensorrt_engine.py": "finds the library, whose version is in an engine's key",
    "runtime/atomic.py": "how files are written",
    "export/families/__init__.py": "which family there is, not what it computes",
    "export/families/sana/recipe.py": "which layers are in 8 bits: it is recorded in the key of a quantized graph",
    "export/options.py": "what decides a graph is in its key by value: precision, opset, shapes",
    "export/quant/evidence.py": "what ranges rest on: it is recorded beside a graph",
    "runtime/bundle/calibration.py": "what ranges rest on: it is recorded beside a graph",
    "export/build/build_key.py": "hashes input files",
    "export/build/journal.py": "writes files",
    "export/convert/writer.py": "writes checkpoints",
    "runtime/bundle/integrity.py": "hashes input files",
    "runtime/bundle/jsondata.py": "reads and writes JSON",
    "runtime/bundle/manifest.py": "facts that are in specs and in the manifest",
    "runtime/conditioning.py": "names that are in the specs",
    "runtime/schedulers/__init__.py": "parameters, of which a graph has the length of the history: in its shapes",
    "runtime/text.py": "the text's data, of which a graph has the lengths: in its shapes",
    "runtime/lora/choice.py": "names and scales of files, which are in the key",
    "runtime/bundle/safetensors.py": "reads a LoRA's file, whose hash is in the key",
    "runtime/session.py": "types",
    "runtime/vae.py": "tiles, between runs of a finished graph; their size is in the shapes of the graph",
    "runtime/metrics.py": "compares a finished graph",
    "runtime/sessions/onnxruntime.py": "runs a finished graph",
    "runtime/sessions/openvino.py": "names a file and words an error",
    "runtime/sessions/openvino_library.py": "finds the library, whose version is in the key",
    "runtime/sessions/tensorrt_log.py": "log lines",
    "runtime/gpu.py": "the GPU is in an engine's key",
    "runtime/plugins/__init__.py": "registers the plugin, whose own file is hashed",
    "runtime/plugins/kernels.py": "launches kernels when an engine runs",
    "runtime/rng.py": "draws noise between steps",
    "runtime/bundle/golden.py": "reads the self-test",
    "runtime/plugins/linear_attention.py": "of graphs: imported for the plugin alone, and in the hash of engines",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source that a test may edit."""
    for part in ("export", "runtime"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def hashes(root: Path) -> dict[str, str]:
    """All three hashes of the source below root, computed anew: the functions' caches are bypassed."""
    functions: tuple[Callable[[Path], str], ...] = (graph_source, engine_source, bundle_source)
    return {function.__name__: function.__wrapped__(root) for function in functions}  # type: ignore[attr-defined]


def changed(root: Path, path: str, edit: Callable[[str], str]) -> set[str]:
    """The hashes that an edit of the file changes."""
    before, file = hashes(root), root / path
    text = file.read_text(encoding="utf-8")
    assert edit(text) != text
    file.write_text(edit(text), encoding="utf-8")
    after = hashes(root)
    return {name for name in before if before[name] != after[name]}


def more_code(text: str) -> str:
    return text + "\nONE_MORE_CONSTANT = 1\n"


def test_every_source_that_is_named_is_there() -> None:
    missing = [name for name in (*GRAPH_SOURCES, *ENGINE_SOURCES) if not (ROOT / name).exists()]
    assert not missing, f"export/build/source_hash.py names files that do not exist: {missing}"


def test_every_exception_still_excludes_a_file() -> None:
    for names, but in ((GRAPH_SOURCES, NOT_IN_GRAPHS), (("export", "runtime"), NOT_IN_BUNDLES)):
        files = source_files(names)
        assert not [pattern for pattern in but if not any(path.match(pattern) for path in files)]


@pytest.mark.parametrize("path", ["export/networks/layers.py", "export/engine/build.py"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"""', '"""Other words. ', 1),
        lambda text: text + "\n\n# One more comment.\n",
        lambda text: text.replace("\n\n\n", "\n\n\n\n", 1),
        lambda text: text.replace("):\n", "):\n    # said inside\n", 1).replace(
            "(self,", "(\n        self,", 1
        ),
    ],
    ids=["docstring", "comment", "blank line", "layout"],
)
def test_words_and_formatting_change_no_key(source: Path, path: str, edit: Callable[[str], str]) -> None:
    assert changed(source, path, edit) == {"bundle_source"}


def test_a_changed_constant_changes_the_key(source: Path) -> None:
    def edit(text: str) -> str:
        return text.replace("SINUSOID_WIDTH = 256", "SINUSOID_WIDTH = 128")

    assert changed(source, "export/networks/layers.py", edit) == {"graph_source", "bundle_source"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("export/families/sana/network.py", {"graph_source"}),
        ("export/graph/passes/qdq.py", {"graph_source"}),
        ("export/quant/plan.py", {"graph_source"}),
        ("export/checkpoint/tensors.py", {"graph_source"}),
        ("export/example_inputs.py", {"graph_source"}),
        ("export/build/golden.py", {"graph_source"}),
        ("runtime/spec.py", {"graph_source"}),
        ("export/engine/profiles.py", {"engine_source"}),
        ("runtime/plugins/linear_attention.py", {"engine_source"}),
        ("export/families/sana/recipe.py", set()),
        ("export/families/__init__.py", set()),
        ("export/families/sana/convert.py", set()),
        ("export/families/sd3/native.py", set()),
        ("export/convert/writer.py", set()),
        ("export/build/builder.py", set()),
        ("runtime/pipeline.py", set()),
    ],
)
def test_new_code_changes_the_hash_of_what_it_shapes(source: Path, path: str, expected: set[str]) -> None:
    assert changed(source, path, more_code) == {*expected, "bundle_source"}


def test_a_verb_of_the_command_changes_nothing(source: Path) -> None:
    assert changed(source, "export/commands/build.py", more_code) == set()


def test_a_new_file_and_a_new_name_change_the_hash(source: Path) -> None:
    before = hashes(source)["graph_source"]
    layers = source / "export" / "networks" / "layers.py"
    layers.rename(layers.with_name("more_layers.py"))
    renamed = hashes(source)["graph_source"]
    (source / "export" / "networks" / "empty.py").touch()
    assert len({before, renamed, hashes(source)["graph_source"]}) == 3


def test_a_string_that_is_used_is_not_a_docstring() -> None:
    assert code_of(b'def f():\n    "words"\n    return "a"\n') == code_of(b'def f():\n    return "a"\n')
    assert code_of(b'x = "a"\n') != code_of(b'x = "b"\n')


def unhashed(files: list[Path], sources: list[Path]) -> dict[str, set[str]]:
    """The imports of each file that are neither hashed nor reviewed."""
    known = {path.relative_to(ROOT).as_posix() for path in sources} | REVIEWED.keys()
    found = {path.relative_to(ROOT).as_posix(): set(imported(path)) - known for path in files}
    return {path: names for path, names in found.items() if names}


def test_what_a_hashed_file_imports_is_hashed_or_reviewed() -> None:
    """Else a change there would leave stale artifacts. For example, a network must not read its family's convert.py."""
    assert not unhashed(GRAPH_FILES, GRAPH_FILES)
    assert not unhashed(ENGINE_FILES, [*GRAPH_FILES, *ENGINE_FILES])
    convert = source_files(["export/families/sana/convert.py"])
    assert "export/convert/layout.py" in unhashed(convert, GRAPH_FILES)["export/families/sana/convert.py"]


def imported(path: Path) -> Iterator[str]:
    """Files of ditc that the file imports, directly or indirectly."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ditc."):
            for alias in node.names:
                yield file_of(f"{node.module}.{alias.name}") or file_of(node.module) or node.module
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name.startswith("ditc."))
            yield from (file_of(name) or name for name in names)


def file_of(module: str) -> str | None:
    path = ROOT.joinpath(*module.split(".")[1:])
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file.relative_to(ROOT).as_posix()
    return None
