"""Engines with replaceable weights: which weights they are, in the graph's names and in the library's."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditc.export.engine.graph_files import inlined
from ditc.export.engine.refittable import refittable_weights
from ditc.export.engine.tensorrt import Compiler
from ditc.export.options import BuildOptions
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import UsageError
from ditc.runtime.spec import CONDITIONER, DENOISER, TEXT_ENCODER, Backend, Precision


@pytest.mark.parametrize("stage", [TEXT_ENCODER, CONDITIONER, DENOISER])
def test_the_library_knows_each_of_them_by_its_name_in_the_graph(stage: str, tiny_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    graph = tiny_bundle / load_manifest(tiny_bundle).stages[stage].artifacts[0].file.path
    names = refittable_weights(graph)
    compiler = Compiler(Backend.TENSORRT_RTX)
    with inlined(graph) as path:
        assert compiler.parse(path) is None
    assert names and compiler.allow_refit([*names, "no_weight"]) == ["no_weight"]


def test_they_are_the_matrices_and_kernels_of_the_layers(tiny_bundle: Path) -> None:
    graph = tiny_bundle / load_manifest(tiny_bundle).stages[DENOISER].artifacts[0].file.path
    names = set(refittable_weights(graph))
    block = "network.transformer_blocks.0"
    for layer in ("attn1.to_q", "attn2.to_out.0", "ff.conv_inverted", "ff.conv_point"):
        assert f"{block}.{layer}.weight" in names
    assert not [name for name in names if name.endswith((".bias", "scale_shift_table"))]


def test_weights_in_8_bits_cannot_stay_replaceable() -> None:
    from ditc.export.build.preflight import check_options

    options = BuildOptions(backend=Backend.TENSORRT, precision=Precision.INT8, refit=True)
    with pytest.raises(UsageError, match="--refit is not made for int8"):
        check_options(options)
    with pytest.raises(UsageError, match="--refit is an option of engines"):
        check_options(BuildOptions(refit=True))
