"""The weight map: reading and writing it, and converting tensors to initializers and back, in numpy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ditc.runtime.errors import BundleError
from ditc.runtime.weight_map import (
    Codes,
    Transform,
    Weight,
    apply,
    invert,
    read_weight_map,
    weight_map_path,
    write_weight_map,
)

CONV = Weight(
    checkpoint="patch_embed.weight",
    stage="denoiser",
    initializer="network.patch_embed.weight",
    transforms=(Transform.RESHAPE, Transform.TRANSPOSE),
    shape=(3, 2, 2, 2),
    dtype="float32",
    stored_shape=(8, 3),
)
CODES = replace(
    CONV,
    transforms=(Transform.TRANSPOSE, Transform.SMOOTH, Transform.QUANTIZE),
    shape=(3, 8),
    codes=Codes(axis=1, scale="s", reciprocals="r"),
)
# What a build of version 0.1.0 wrote.
EARLIER = {
    "checkpoint": "patch_embed.weight",
    "stage": "denoiser",
    "initializer": "network.patch_embed.weight",
    "transforms": ["reshape", "transpose"],
    "shape": [3, 2, 2, 2],
    "dtype": "float32",
}


def test_a_map_is_the_same_after_reading(tmp_path: Path) -> None:
    path = weight_map_path(tmp_path / "denoiser.onnx")
    assert path.name == "denoiser.onnx.weights.json"
    write_weight_map(path, [CONV, CODES])
    assert read_weight_map(path) == (CONV, CODES)


def test_a_map_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "denoiser.onnx.weights.json"
    path.write_text(json.dumps([EARLIER]))
    (weight,) = read_weight_map(path)
    assert weight == replace(CONV, stored_shape=None)
    tensor = np.arange(24.0).reshape(weight.shape)
    with pytest.raises(BundleError, match="does not hold the shape"):
        apply(weight, tensor)
    stored = apply(weight, tensor, stored_shape=(8, 3))
    np.testing.assert_array_equal(invert(weight, stored), tensor)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "{}", "3", '["x"]', "[" * 100_000),
        json.dumps([{**EARLIER, "transforms": ["rotate"]}]),
        json.dumps([{**EARLIER, "transforms": ["transpose"] * 1000}]),
        json.dumps([{**EARLIER, "shape": [3, -2, 2, 2]}]),
        json.dumps([{**EARLIER, "shape": [10**400]}]),
        json.dumps([{**EARLIER, "stored_shape": [8, 4]}]),
        json.dumps([{**EARLIER, "codes": {"axis": 7, "scale": "s"}}]),
    ],
)
def test_a_damaged_map_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(BundleError, match=r"w\.json is not a weight map") as caught:
        read_weight_map(tmp_path / "w.json")
    assert caught.value.hint


def test_a_missing_map_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"w\.json is not a weight map"):
        read_weight_map(tmp_path / "w.json")


@pytest.mark.parametrize("transforms", [(), ("reshape",), ("transpose",), ("reshape", "transpose")])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])  # bf16 is stored as uint16
def test_inverting_undoes_applying_bit_for_bit(transforms: tuple[str, ...], dtype: type) -> None:
    shape = (3, 2, 2, 2) if "reshape" in transforms else (3, 8)
    stored_shape = (8, 3) if "transpose" in transforms else (3, 8)
    weight = replace(
        CONV, transforms=tuple(map(Transform, transforms)), shape=shape, stored_shape=stored_shape
    )
    tensor = np.arange(24).reshape(shape).astype(dtype)
    stored = apply(weight, tensor)
    assert (stored.shape, stored.dtype) == (stored_shape, tensor.dtype)
    back = invert(weight, stored)
    assert back.dtype == tensor.dtype
    np.testing.assert_array_equal(back, tensor)


def test_values_are_stored_in_the_order_of_the_matrix_product() -> None:
    """x @ stored is what the convolution over flattened patches computes."""
    tensor = np.arange(24.0).reshape(3, 2, 2, 2)
    patch = np.arange(8.0)
    np.testing.assert_allclose(patch @ apply(CONV, tensor), tensor.reshape(3, 8) @ patch)


@pytest.mark.parametrize("axis", [0, 1])
def test_quantized_values_become_the_floats_that_the_graph_computes_with(axis: int) -> None:
    rng = np.random.default_rng(0)
    matrix_OI = rng.normal(size=(3, 8)).astype(np.float32)
    factors_I = rng.uniform(0.5, 2, 8).astype(np.float32)
    smoothed_OI = matrix_OI * factors_I
    scale_O = np.abs(smoothed_OI).max(axis=1) / 127
    codes_OI = np.rint(smoothed_OI / scale_O[:, None]).astype(np.int8)
    transposed = (Transform.TRANSPOSE,) if axis == 1 else ()
    weight = replace(
        CODES,
        transforms=(*transposed, Transform.SMOOTH, Transform.QUANTIZE),
        codes=Codes(axis=axis, scale="s", reciprocals="r"),
    )
    got = invert(weight, codes_OI.T if axis == 1 else codes_OI, {"s": scale_O, "r": 1 / factors_I})
    assert got.shape == (3, 8)
    # Half a quantization step, divided by the smallest factor, 0.5.
    np.testing.assert_allclose(got, matrix_OI, atol=float(scale_O.max()) * 1.01)


def test_quantized_weights_cannot_be_applied_and_are_inverted_only_with_their_scales() -> None:
    with pytest.raises(BundleError, match=r"network\.patch_embed\.weight is stored in 8 bits"):
        apply(CODES, np.zeros((3, 8)))
    for weight, arrays in ((replace(CODES, codes=None), {"s": np.ones(3)}), (CODES, {"s": np.ones(3)})):
        with pytest.raises(
            BundleError, match=r"the scales of network\.patch_embed\.weight, .* are not known"
        ):
            invert(weight, np.zeros((8, 3), np.int8), arrays)
