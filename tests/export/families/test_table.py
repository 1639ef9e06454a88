"""A family is one folder and one row: what a row provides, and that a new family needs no other edit."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditc.calib.sensitivity import base_recipe
from ditc.export import families
from ditc.export.checkpoint.open import Checkpoint, open_checkpoint
from ditc.export.families import DIFFUSERS, FAMILIES, Family, family_of, find_adapter
from ditc.export.quant.formats import Format
from ditc.export.quant.recipes import find_recipe, recipes_of
from ditc.parity import reference
from ditc.runtime.cli import main
from ditc.runtime.spec import Precision

FOLDER = Path(families.__file__).parent
by_label = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)


@by_label
def test_the_adapter_of_a_row_has_its_label(family: Family) -> None:
    assert family.adapter.family == family.label and family_of(family.label) is family


@by_label
def test_a_family_has_a_recipe_for_each_format(family: Family) -> None:
    usual = [f"{family.label}-{kind.value}" for kind in Format]
    assert list(family.recipes)[: len(usual)] == usual
    # A variant of the family, such as a distilled model, has a name that begins with the family's.
    static = {name for name in family.recipes if not name.endswith("-int8-dynamic")}
    variants = {name.rsplit("-", 1)[0] for name in static}
    assert static == {f"{name}-{kind.value}" for name in variants for kind in Format}
    assert all(name.startswith(family.label) for name in variants)
    assert all(name == recipe.name for name, recipe in family.recipes.items())


@by_label
def test_has_native_layout_is_true_exactly_where_there_is_a_converter(family: Family) -> None:
    assert family.has_native_layout == (FOLDER / family.folder / "convert.py").is_file()
    assert (family.layout is None) == (not family.has_native_layout)


@by_label
def test_parity_has_a_pipeline_exactly_where_diffusers_has_none(family: Family) -> None:
    assert (reference.pipeline_of(family) is None) == (family.upstream == DIFFUSERS)


def test_every_folder_has_a_row_and_every_row_a_folder() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*/adapter.py")}
    assert folders == {family.folder for family in FAMILIES}


@by_label
def test_no_family_imports_another(family: Family) -> None:
    """Code that two families need is in common/ or networks/."""
    others = tuple(other.package for other in FAMILIES if other is not family)
    for path in (FOLDER / family.folder).glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [name for name in modules if name.startswith(others)], path


def test_the_table_is_imported_without_torch_and_without_a_family() -> None:
    code = "import sys, ditc.export.families as f; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", *(f"{family.package}.adapter" for family in FAMILIES)} & set(loaded.split())


# A new family


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Family:
    """A new family: the folder tests/toy_family/ and one row."""
    row = Family(label="toy", package="toy_family", has_native_layout=True, upstream="toy_package")
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, row))
    return row


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A file in the toy family's own layout."""
    path = tmp_path / "toy.safetensors"
    save_file({"toy.w": torch.arange(6.0).reshape(2, 3)}, path)
    return path


@pytest.fixture
def checkpoint(toy: Family, native: Path, tmp_path: Path) -> Checkpoint:
    """The native file, converted by `ditc convert`."""
    assert main(["convert", str(native), str(tmp_path / "diffusers")]) == 0
    return open_checkpoint(tmp_path / "diffusers")


def test_a_new_familys_files_are_converted_both_ways(
    checkpoint: Checkpoint, native: Path, tmp_path: Path
) -> None:
    assert list(checkpoint.component("transformer").tensors) == ["toys.0.weight"]
    back = tmp_path / "back.safetensors"
    assert main(["convert", "--to-native", str(checkpoint.path), str(back)]) == 0
    assert torch.equal(load_file(back)["toy.w"], load_file(native)["toy.w"])


def test_a_new_familys_adapter_is_found(toy: Family, checkpoint: Checkpoint) -> None:
    assert find_adapter(checkpoint) is toy.adapter


def test_a_new_familys_recipes_are_found_by_builds_and_searches(toy: Family) -> None:
    assert list(recipes_of("toy")) == ["toy-int8", "toy-fp8", "int8-weight-only", "fp8-weight-only"]
    for precision, kind in ((Precision.INT8, Format.INT8), (Precision.FP8, Format.FP8)):
        recipe = find_recipe(None, precision, "toy")
        assert recipe is toy.recipes[f"toy-{kind.value}"] and recipe is base_recipe(kind, "toy")
        assert recipe.formats(["toys.1", "proj_out"]) == {"toys.1": kind}


def test_a_new_familys_upstream_is_found(
    toy: Family, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("ditc.parity.reference.toy_family")
    module.open_pipeline = lambda checkpoint, dtype: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert reference.upstream_name(checkpoint) == "toy_package"
    assert reference.why_no_upstream(checkpoint) == "the toy_package package is not installed"
    assert reference.find_pipeline(checkpoint) is module.open_pipeline  # type: ignore[attr-defined]


def test_a_file_of_no_family_is_refused_and_the_convertible_families_are_listed(
    toy: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"double_blocks.0.weight": torch.ones(1)}, path)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert "can be converted: sana, sd3, toy" in capsys.readouterr().err


def test_a_family_without_a_native_layout_is_refused(
    mmdit_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.safetensors")
    assert main(["convert", "--to-native", str(mmdit_checkpoint), out]) == 2
    assert "of the family mmdit, which has no native layout" in capsys.readouterr().err
