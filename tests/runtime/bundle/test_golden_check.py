"""A golden file whose numbers cannot be is refused before memory is taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ditc.runtime.bundle.golden import METADATA, read_golden, self_test
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.bundle.safetensors import read_safetensors
from ditc.runtime.errors import BundleError
from ditc.runtime.spec import CONDITIONER


def changed(bundle: Path, out: Path, **changes: Any) -> Path:
    """The conditioner's golden file with other metadata."""
    golden = load_manifest(bundle).stages[CONDITIONER].golden
    assert golden is not None
    tensors, metadata = read_safetensors(bundle / golden.path)
    info = {**json.loads(metadata[METADATA]), **changes}
    save_file(dict(tensors), out, metadata={METADATA: json.dumps(info)})
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {"text_embeds": [2**20, 2**20], "text_mask": [1, 4]}}, "values, more than"),
        ({"inputs": {"text_embeds": [-1, 4], "text_mask": [1, 4]}}, "text_embeds has the shape"),
        ({"inputs": {"nothing": [1]}}, "in.nothing"),
        ({"strides": {"cross_kv": 0, "text_bias": 1}}, "is not every 0th value"),
        ({"strides": {"cross_kv": 10**400, "text_bias": 1}}, "too large"),
        ({"strides": {}}, "holds no golden values: 'cross_kv'"),
        ({"losses": {"bf16": float("nan")}}, "nan is not a finite number"),
        ({"losses": {"bf16": 1e9}}, "between 0 and 1"),
    ],
)
def test_golden_values_that_cannot_be_are_refused(
    tiny_bundle: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        read_golden(changed(tiny_bundle, tmp_path / "g.safetensors", **changes))


def test_golden_values_of_another_stage_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    from ditc.runtime.pipeline import Pipeline

    manifest = load_manifest(tiny_bundle)
    golden = read_golden(changed(tiny_bundle, tmp_path / "g.safetensors"))
    with (
        Pipeline.load(tiny_bundle, threads=1) as pipeline,
        pytest.raises(BundleError, match="denoiser: its golden"),
    ):
        self_test("denoiser", pipeline.sessions["denoiser"], manifest.stages["denoiser"].artifacts[0], golden)


def test_an_array_with_nan_is_no_golden_value(tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(changed(tiny_bundle, tmp_path / "g.safetensors"), tmp_path / "h.safetensors"))
    tensors, metadata = read_safetensors(path)
    tensors["out.cross_kv"] = np.full_like(tensors["out.cross_kv"], np.nan)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(BundleError, match="finite fp32"):
        read_golden(path)


@pytest.mark.parametrize("more", [b"\0", b"more than the tensors"])
def test_bytes_that_belong_to_no_tensor_are_refused(tiny_bundle: Path, tmp_path: Path, more: bytes) -> None:
    path = changed(tiny_bundle, tmp_path / "g.safetensors")
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(BundleError, match="the tensors end at byte"):
        read_safetensors(path)


def test_metadata_that_is_not_text_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {METADATA: "{}", "more": 1e30}}).encode()
    path = tmp_path / "g.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BundleError, match="not all text"):
        read_safetensors(path)
