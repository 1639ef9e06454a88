"""The table of backends: a new backend is one file and one row, and no other code compares with a certain backend."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from ditc.export.build.previous_build import in_order
from ditc.runtime.bundle.certificate import load_certificate
from ditc.runtime.bundle.manifest import Artifact, load_manifest, save_manifest
from ditc.runtime.bundle.onnx_references import onnx_references
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import SessionError, UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.session import ComputeDevice, Session, Tensor, to_numpy
from ditc.runtime.sessions.device import Device
from ditc.runtime.sessions.opening import open_session
from ditc.runtime.sessions.registry import (
    RTX_TARGETS,
    BackendRow,
    available_backends,
    backend_names,
    build_backends,
    find_row,
    is_graph,
    library_version,
    missing,
    registered,
    row_of,
    rows,
)
from ditc.runtime.spec import VAE_ENCODER, Backend, StageSpec

ROOT = Path(__file__).parents[3]

# The file of a new backend


class ToySession:
    """A stage in a bare ONNX Runtime session, which stands for another library."""

    def __init__(self, model: Path, spec: StageSpec, threads: int) -> None:
        self.spec = spec
        self.device = ComputeDevice(kind="cpu", name="the toy")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [tensor.name for tensor in self.spec.outputs]
        given = {name: to_numpy(feed) for name, feed in feeds.items()}
        return dict(zip(names, self._session.run(names, given), strict=True))

    def close(self) -> None:
        """Nothing to release."""


def open_toy(
    row: BackendRow, model: Path, artifact: Artifact, options: LoadOptions, device: Device | None
) -> Session:
    return ToySession(model, artifact.spec, options.threads)


# Its row

TOY = BackendRow(
    name=Backend("toy"),
    title="Toy",
    packages=("numpy",),
    lack=lambda row: "",
    open=open_toy,
    references=onnx_references,
    builds_engines=True,
)


@pytest.fixture
def toy() -> Iterator[BackendRow]:
    with registered(TOY):
        yield TOY


@pytest.fixture
def toy_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle with the toy as the backend of all artifacts."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    data = json.loads((bundle / "manifest.json").read_text())
    manifest = load_manifest(bundle)
    stages = {
        name: replace(stage, artifacts=tuple(replace(a, backend=Backend("toy")) for a in stage.artifacts))
        for name, stage in manifest.stages.items()
    }
    save_manifest(replace(manifest, stages=stages), bundle)
    written = (bundle / "manifest.json").read_text()
    assert data["stages"].keys() == json.loads(written)["stages"].keys() and '"backend": "toy"' in written
    return bundle


REQUEST = Request(prompt="red cat", num_inference_steps=2, height=64, width=64, seed=3, output_type="np")


@pytest.mark.usefixtures("toy")
def test_a_backend_of_one_file_and_one_row_draws_a_picture(toy_bundle: Path, pipeline: Pipeline) -> None:
    chosen, reason = choose(load_manifest(toy_bundle))
    assert {artifact.backend for artifact in chosen.values()} == {"toy"}
    assert reason == "toy fp32: Toy is installed"
    with Pipeline.load(toy_bundle, backend="toy", threads=1) as ours:
        opened = [session for name, session in ours.sessions.items() if name != VAE_ENCODER]
        assert all(isinstance(session, ToySession) for session in opened)
        np.testing.assert_allclose(ours.draw(REQUEST).images, pipeline.draw(REQUEST).images, atol=1e-5)
    (entry,) = load_certificate(toy_bundle, load_manifest(toy_bundle)).entries
    assert entry.self_test is not None and entry.self_test.passed, "no build has tried the toy's kernels"


@pytest.mark.usefixtures("toy")
def test_every_verb_accepts_the_new_backend(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    small = ["--steps", "2", "--height", "64", "--width", "64", "--seed", "3"]
    assert main(["run", str(toy_bundle), "red cat", "-o", str(out), "--backend", "toy", *small]) == 0
    assert out.is_file()
    assert main(["verify", str(toy_bundle), "--run", "--backend", "toy"]) == 0
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "toy" in capsys.readouterr().out
    assert backend_names() == ("auto", "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "toy")
    assert build_backends() == ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "toy")


@pytest.mark.usefixtures("toy")
def test_doctor_lists_the_new_backend(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert "ok  runs        toy: Toy is installed" in lines
    assert any(line.startswith(f"ok  builds      toy {library_version(TOY.name)} for ") for line in lines)
    with registered(replace(TOY, name=Backend("toy-2"), lack=lambda row: f"{row.name}: {row.install}")):
        main(["doctor"])
    assert "-   cannot run  toy-2: toy-2: pip install ditc" in capsys.readouterr().out


def test_the_error_says_what_a_backend_lacks_and_auto_takes_another(
    tiny_bundle: Path, toy_bundle: Path
) -> None:
    with registered(replace(TOY, lack=lambda row: "no toys here: buy some")):
        assert "toy" not in available_backends()
        assert {a.backend for a in choose(load_manifest(tiny_bundle))[0].values()} == {"onnxruntime"}
        with pytest.raises(SessionError, match="denoiser: no toys here: buy some") as caught:
            Pipeline.load(toy_bundle, backend="toy")
        assert caught.value.hint == "or run the ONNX Runtime artifact: --backend onnxruntime"


# Bundles of a newer version of ditc, which knows more backends


def test_artifacts_of_an_unknown_backend_are_skipped(
    tiny_bundle: Path, toy_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bundle to which a newer version of ditc has added a backend still draws with the backends of this version."""
    caplog.set_level("INFO", logger="ditc")
    manifest, ours = load_manifest(toy_bundle), load_manifest(tiny_bundle)
    both = {
        name: replace(stage, artifacts=(*stage.artifacts, *ours.stages[name].artifacts))
        for name, stage in manifest.stages.items()
    }
    chosen, _ = choose(replace(manifest, stages=both))
    assert {artifact.backend for artifact in chosen.values()} == {"onnxruntime"}
    assert "skipped: this version of ditc does not know the backend toy" in caplog.text


def test_a_bundle_that_has_only_unknown_backends_asks_for_an_update(toy_bundle: Path) -> None:
    with pytest.raises(UsageError, match="holds denoisers for toy fp32; requested: auto") as caught:
        Pipeline.load(toy_bundle)
    assert str(caught.value.hint).startswith("update ditc, which does not know toy")
    artifact = load_manifest(toy_bundle).stages["denoiser"].artifacts[0]
    with pytest.raises(SessionError, match="does not know the backend 'toy'"):
        open_session(toy_bundle / artifact.file.path, artifact, LoadOptions())
    assert not is_graph(artifact)
    assert main(["verify", str(toy_bundle)]) == 0 and main(["inspect", str(toy_bundle)]) == 0
    assert main(["run", str(toy_bundle), "cat", "--backend", "toy"]) == USAGE


@pytest.mark.parametrize("name", ["", "Toy", "a b", "../toy", "-toy", "toy-", "a--b"])
def test_a_backend_whose_name_could_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a backend's name"):
        Backend(name)


# The rows


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_every_row_has_what_other_code_needs(row: BackendRow) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if row.extra is not None:
        required = {line.split(">")[0].split("=")[0] for line in extras[row.extra]}
        assert required == {row.packages[0], *row.needs}
    assert find_row(row.name) is row and row_of(row.name) is row
    assert row.title and row.packages and ("{model}" in row.polygraphy or not row.polygraphy)
    lack = row.lack(row)
    assert lack == missing(row.name) and (not lack or "pip install" in lack or "no NVIDIA GPU" in lack)
    assert (row.name in available_backends()) is not bool(lack)
    assert row.builds_engines or not (row.same_library or row.same_gpu or row.built_on_gpu or row.targets)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_the_functions_of_a_row_exist_and_take_their_arguments(row: BackendRow) -> None:
    """The table names them with strings, which a type checker cannot follow."""
    for later, arguments in ((row.lack, 1), (row.open, 5)):
        names = dict(
            zip(later.__code__.co_freevars, (cell.cell_contents for cell in later.__closure__), strict=True)
        )
        function = getattr(__import__(names["module"], fromlist=["x"]), names["function"])
        inspect.signature(function).bind(*range(arguments))


def test_engines_are_preferred_and_graphs_are_written_first(tiny_bundle: Path) -> None:
    """The order in a manifest is that of earlier versions: else its digest would change, and a signature with it."""
    assert [row.name for row in rows()] == ["tensorrt", "tensorrt-rtx", "openvino", "onnxruntime"]
    assert all(target.startswith("sm") for target in RTX_TARGETS)
    artifact = load_manifest(tiny_bundle).stages["denoiser"].artifacts[0]
    names = ("unheard-of", "tensorrt", "openvino", "onnxruntime", "tensorrt-rtx")
    some = in_order(replace(artifact, backend=Backend(name)) for name in names)
    assert [a.backend for a in some] == ["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "unheard-of"]


def test_a_name_is_in_the_table_once(toy: BackendRow) -> None:
    with pytest.raises(UsageError, match="'toy' is already in the table"), registered(toy):
        pass


# No other code compares with a certain backend

# Files that are about TensorRT alone, and need to tell its two libraries apart.
TENSORRT = {
    "runtime/sessions/tensorrt_engine.py",
    "export/engine/tensorrt.py",
    "export/engine/targets.py",
    "export/engine/plugins.py",
}
NAMES = {str(row.name) for row in rows()}


def names_a_backend(node: ast.AST) -> bool:
    """`Backend.X`, the constant of a backend, or its name as text; also among the items of a tuple, list or set."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(map(names_a_backend, node.elts))
    if isinstance(node, ast.Attribute):
        return ast.unparse(node.value).split(".")[-1] == "Backend"
    if isinstance(node, ast.MatchValue):
        return names_a_backend(node.value)
    if isinstance(node, ast.Constant):
        return node.value in NAMES
    return isinstance(node, ast.Name) and node.id == "GRAPH_BACKEND"


def comparisons(source: str) -> Iterator[str]:
    """Comparisons, match cases and dictionary keys that are about a certain backend."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            parts: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            parts = [node.pattern]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if isinstance(key, ast.Attribute)]
        else:
            continue
        if any(names_a_backend(part) for part in parts):
            yield f"{node.lineno if isinstance(node, ast.expr) else 0}: {ast.unparse(node)}"


def sources(*parts: str) -> Iterator[Path]:
    for part in parts:
        yield from (path for path in (ROOT / part).rglob("*.py") if "__pycache__" not in path.parts)


def test_no_file_but_tensorrts_compares_with_a_certain_backend() -> None:
    found = {
        name: list(comparisons(path.read_text(encoding="utf-8")))
        for path in sources("runtime", "export", "parity", "calib", "benchmarks", "demo")
        if (name := path.relative_to(ROOT).as_posix()) not in TENSORRT
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "a.backend is not Backend.ONNXRUNTIME",
        "a.backend == 'onnxruntime'",
        "backend in ('auto', Backend.TENSORRT)",
        "spec.Backend.TENSORRT is x",
        "backend != GRAPH_BACKEND",
        "{Backend.TENSORRT: 1}",
        "match backend:\n    case 'tensorrt-rtx':\n        pass",
    ],
)
def test_the_check_of_comparisons_finds_every_form(line: str) -> None:
    assert list(comparisons(line))
    assert not list(comparisons("a.backend is other.backend"))


def test_no_code_asks_a_session_for_attributes_that_are_not_in_its_protocol() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in sources("runtime", "parity")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
        if any(word in ast.unparse(node).lower() for word in ("session", "provider", "tensor,", "sample"))
    ]
    assert found == []
