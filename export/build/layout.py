"""Where a build puts the files of a bundle. Names contain the key, so that no build overwrites another build's file."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from ditc.runtime.spec import Backend, Precision

GRAPHS, ENGINES, GOLDEN = "onnx", "engines", "golden"
# Every folder of a bundle that builds write to. Those of tokenizers have the names of the checkpoint's components.
FOLDERS = (GRAPHS, ENGINES, GOLDEN, "tokenizer*")


def is_build_folder(name: str) -> bool:
    """Whether builds write to the folder of this name in a bundle."""
    return any(fnmatchcase(name, pattern) for pattern in FOLDERS)


def build_folders(bundle: Path) -> list[Path]:
    """Everything in the bundle that has the name of such a folder, links included that lead nowhere."""
    return sorted(path for path in bundle.glob("*") if is_build_folder(path.name))


def graph_path(bundle: Path, stage: str, precision: Precision, key: str) -> Path:
    """The path of a stage's ONNX file."""
    return bundle / GRAPHS / f"{stage}-{precision.value}-{key[:8]}.onnx"


def engine_path(bundle: Path, stage: str, precision: Precision, backend: Backend, key: str) -> Path:
    """The path of a stage's engine."""
    return bundle / ENGINES / f"{stage}-{precision.value}-{key[:8]}.{backend.value}"


def ir_path(bundle: Path, stage: str, precision: Precision, key: str) -> Path:
    """The path of a stage in OpenVINO's form. Its weights lie beside it."""
    return bundle / ENGINES / f"{stage}-{precision.value}-{key[:8]}.openvino.xml"


def golden_path(bundle: Path, stage: str, key: str) -> Path:
    """The path of a stage's golden inputs and outputs."""
    return bundle / GOLDEN / f"{stage}-{key[:8]}.safetensors"
