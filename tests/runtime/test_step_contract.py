"""The step contract: it is read from a spec and a manifest, and the exported module follows it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ditc.export.graph.step import wrap
from ditc.runtime.bundle.jsondata import digest_of, from_json, serialize, to_json
from ditc.runtime.bundle.manifest import Manifest, load_manifest
from ditc.runtime.spec import DENOISER, DType, StageSpec, TensorSpec
from ditc.runtime.step_contract import (
    GUIDANCE,
    ROWS,
    SKIP_GATE,
    GuidanceMode,
    StepContract,
    coefficient_columns,
)

CONDITIONING = (TensorSpec("text", DType.FLOAT32, (ROWS, 3)),)
CONTRACTS = [
    StepContract(history_length=history, noise=noise, guidance=guidance, skip_gate=gate)
    for history, noise, guidance, gate in product((1, 2), (False, True), GuidanceMode, (False, True))
]


def spec_of(contract: StepContract) -> StageSpec:
    return StageSpec(DENOISER, contract.inputs(4, CONDITIONING), contract.outputs(4), {})


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_contract_is_read_back_from_the_spec_that_it_wrote(contract: StepContract) -> None:
    spec = spec_of(contract)
    assert StepContract.of(spec, contract.guidance) == contract
    assert spec.input("coefficients").shape[1] == len(contract.columns)


def test_columns_of_the_coefficients_have_names() -> None:
    assert coefficient_columns(2, True) == ("c_in", "a", "b", "cx", "c0", "h1", "h2", "cn")
    assert coefficient_columns(0, False) == ("c_in", "a", "b", "cx", "c0")


class Spy(nn.Module):
    """A network that keeps its arguments and predicts zeros."""

    def forward(self, latents: Tensor, timestep: Tensor, *rest: Tensor) -> Tensor:
        self.rest = rest
        return torch.zeros_like(latents)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_the_exported_module_takes_and_gives_what_the_contract_says(contract: StepContract) -> None:
    sizes = {"batch": 2, ROWS: 3, "height": 5, "width": 6}
    spec, network = spec_of(contract), Spy()
    feeds = {}
    for tensor in spec.inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
        feeds[tensor.name] = torch.arange(shape[0]) % 2 if tensor.dtype is DType.INT64 else torch.randn(shape)
    outputs = wrap(network, dtype=torch.float32, contract=contract)(*feeds.values())
    for value, tensor in zip(outputs, spec.outputs, strict=True):
        assert list(value.shape) == [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
    wanted = [feeds[GUIDANCE][feeds["row_of"]]] if contract.embeds_guidance else []
    wanted += [feeds["text"], *([feeds[SKIP_GATE]] if contract.skip_gate else [])]
    assert all(torch.equal(a, b) for a, b in zip(network.rest, wanted, strict=True))


def test_a_manifest_states_the_guidance_mode_and_one_without_it_means_cfg(tiny_bundle: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    data = json.loads(json.dumps(to_json(manifest)))
    assert data["guidance"] == "cfg"
    del data["guidance"]
    assert from_json(Manifest, data).guidance is GuidanceMode.CFG
    data["guidance"] = "embedded"
    denoiser = manifest.stages[DENOISER].artifacts[0].spec
    assert from_json(Manifest, data).step_contract(denoiser).embeds_guidance


def test_a_bundle_built_before_the_guidance_mode_was_stated_still_loads(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    from ditc.runtime.bundle import manifest as module

    data = to_json(load_manifest(tiny_bundle))
    del data["guidance"]
    data["digest"] = digest_of({**data, "digest": ""})
    (tmp_path / module.MANIFEST).write_bytes(serialize(data))
    assert load_manifest(tmp_path).guidance is GuidanceMode.CFG


def test_history_of_a_denoiser_is_read_from_its_spec() -> None:
    assert StepContract.of(spec_of(StepContract(history_length=3)), GuidanceMode.CFG).history_length == 3
