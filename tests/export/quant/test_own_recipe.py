"""A checkpoint's own recipe is what an 8-bit build takes by default."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from ditc.export.checkpoint.open import open_checkpoint
from ditc.export.contract import BuildOptions
from ditc.export.families import find_adapter
from ditc.export.quant.apply import prepare
from ditc.export.quant.recipes import recipes_of, save_recipe
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import DENOISER, Precision


@pytest.fixture
def prepared(tiny_checkpoint, tmp_path):
    """The folder of a copy of the tiny checkpoint, and a function that prepares a build of it."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")

    def call(*recipes, precision=Precision.INT8):
        checkpoint, options = open_checkpoint(folder), BuildOptions(precision=precision, recipes=recipes)
        return prepare(options, checkpoint, find_adapter(checkpoint).plan(checkpoint, options))[DENOISER]

    return folder, call


def test_it_is_taken_unless_another_is_named(prepared):
    folder, call = prepared
    own = replace(recipes_of("sana")["int8-weight-only"], name="own")
    save_recipe(own, folder / "recipe.int8.json")
    assert call().recipe == own
    assert call("int8-weight-only").recipe.name == "int8-weight-only"
    with pytest.raises(UsageError, match="sana-fp8 quantizes activations"):
        call(precision=Precision.FP8)  # the file is for INT8


def test_a_damaged_one_is_refused_by_its_name(prepared):
    folder, call = prepared
    (folder / "recipe.int8.json").write_text('{"name": "own"}')
    with pytest.raises(UsageError, match=r"checkpoint/recipe\.int8\.json is not a recipe"):
        call()
