"""LoRAs that are inputs of a bundle's graphs: a server opens the bundle once, and no run mixes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from serving_scheduler import Heard

from ditc.runtime.load_options import LoadOptions
from ditc.runtime.lora.choice import LoraChoice
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.serving import model as module
from ditc.runtime.serving.lora_variants import ServedLora, lora_variants
from ditc.runtime.serving.metrics import Metrics
from ditc.runtime.serving.model import Model
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.refusals import Refusal
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.scheduling.job import Finished, Refused
from ditc.runtime.serving.settings import Bounds, SchedulerOptions
from ditc.runtime.session import Tensor
from ditc.runtime.spec import DENOISER

SIZE: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pil"}
NAMES = ("b", "b@ink", "b@sepia")


def lora(path: Path, seed: int, *, dora: bool = False) -> Path:
    """A LoRA of a layer of the denoiser and of one of the conditioner, of rank 2 + seed."""
    torch.manual_seed(seed)
    tensors = {}
    for layer in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_v"):
        name = f"transformer.{layer}"
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(2 + seed, 32)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(32, 2 + seed)
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = 0.5 + torch.rand(32)
    save_file(tensors, path)
    return path


@pytest.fixture
def choices(tmp_path: Path) -> dict[str, LoraChoice]:
    return {
        "ink": LoraChoice(lora(tmp_path / "ink.safetensors", 0), 0.7),
        "sepia": LoraChoice(lora(tmp_path / "sepia.safetensors", 1)),
    }


class Served:
    """Models over the bundle, and what the denoiser's session was asked for: its LoRA's rank, and its batch."""

    def __init__(self, bundle: Path, choices: Mapping[str, LoraChoice], load: LoadOptions, most: int) -> None:
        self.metrics = Metrics()
        variants = lora_variants({"b": bundle}, choices, load)
        assert all(variant.shares for variant in variants.values())
        self.models = Models(
            {"b": bundle} | dict.fromkeys(variants, bundle),
            admission=Admission(Bounds()),
            load=load,
            scheduled=SchedulerOptions(max_loras=most),
            warm_up_seconds=0,
            shared={name: (variant.bundle, variant.choice) for name, variant in variants.items()},
            observe=self.metrics.observer,
        )
        self.runs: list[tuple[int, int]] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note every run of the denoiser, and let batches pay."""
        with self.models.using("b") as model:
            session, run = model.pipeline.sessions[DENOISER], model.pipeline.sessions[DENOISER].run

        def noted(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            ranks = {matrix.shape[1] for name, matrix in feeds.items() if name.endswith(".lora_down")}
            assert len(ranks) <= 1, "a run has the matrices of two LoRAs"
            self.runs.append((max(ranks, default=0), feeds["latents"].shape[0]))
            return run(feeds)

        monkeypatch.setattr(session, "run", noted)
        times = model.scheduler.times
        monkeypatch.setattr(times, "best_size", lambda key, most: min(most, times.max_batch))

    def submit(self, model: Model, seed: int) -> Heard:
        heard = Heard()
        model.submit(Request(prompt="red cat", seed=seed, **SIZE), heard, id=f"{model.name} {seed}")
        return heard


@pytest.fixture(params=["onnxruntime", "openvino"])
def load(request: pytest.FixtureRequest) -> LoadOptions:
    return LoadOptions(backend=request.param, threads=1)


@pytest.fixture
def served(lora_inputs_bundle: Path, choices, load) -> Iterator[Served]:
    made = Served(lora_inputs_bundle, choices, load, most=1)
    yield made
    made.models.close()


def test_requests_with_different_loras_share_one_model_and_never_a_run(
    served, choices, load, lora_inputs_bundle, monkeypatch
) -> None:
    opened = []
    monkeypatch.setattr(module, "open_pipeline", lambda *a: opened.append(a) or open_pipeline(*a))
    served.watch(monkeypatch)
    with (
        served.models.using("b@ink") as ink,
        served.models.using("b@sepia") as sepia,
        served.models.using("b") as plain,
    ):
        models = (plain, ink, sepia)
        heard = {(m.name, seed): served.submit(m, seed) for seed in (1, 2) for m in models}
        ends = {key: one.wait() for key, one in heard.items()}
    assert len(opened) == 1 and [one.name for one in served.models.all_opened()] == ["b"]
    ranks = {"b": 0, "b@ink": 2, "b@sepia": 3}
    assert {rank for rank, _ in served.runs} == set(ranks.values())
    assert 2 in {size for _, size in served.runs}, "requests with the same LoRA share runs"
    text = served.metrics.text().decode()
    for name in NAMES:
        assert f'ditc_requests_total{{model="{name}",outcome="finished"}} 2.0' in text

    own: dict[str, np.ndarray] = {}
    for name in NAMES:
        with Pipeline.load(lora_inputs_bundle, options=load) as alone:
            alone.load_loras([choices[name.removeprefix("b@")]] if name != "b" else [])
            for seed in (1, 2):
                (picture,) = alone.draw(Request(prompt="red cat", seed=seed, **SIZE)).images
                own[name] = np.asarray(picture).astype(int)
                end = ends[name, seed]
                assert isinstance(end, Finished)
                # The sums of a batch of two may round otherwise, by one of 255 levels.
                assert np.abs(np.asarray(end.images[0]) - own[name]).max() <= 1
    assert all(np.abs(own["b"] - own[name]).max() > 20 for name in NAMES[1:]), "the LoRAs change nothing"


open_pipeline = module.open_pipeline


def test_matrices_are_read_again_within_the_bound_and_a_changed_file_harms_no_other_model(
    served, choices, monkeypatch
) -> None:
    with served.models.using("b@ink") as ink, served.models.using("b@sepia") as sepia:
        matrices = ink.pipeline.sessions[DENOISER].matrices.func.__self__
        assert matrices is sepia.pipeline.sessions[DENOISER].matrices.func.__self__
        first = [served.submit(model, 1).wait() for model in (ink, sepia, ink)]
        assert matrices.count == 1, "matrices of two LoRAs are in memory, and the bound is one"
        same = [np.asarray(end.images[0]) for end in (first[0], first[2])]
        np.testing.assert_array_equal(*same)
        lora(choices["sepia"].file, 2)
        end = served.submit(sepia, 1).wait()
        assert isinstance(end, Refused) and end.refusal.status == 500
        assert "LoRA of this model cannot be read" in str(end.refusal)
        assert str(choices["sepia"].file.parent) not in f"{end.refusal} {end.refusal.hint}"
        assert isinstance(served.submit(ink, 1).wait(), Finished)
        assert not ink.scheduler.problem, "the bundle was opened again"


def test_after_a_crash_the_loras_draw_with_the_sessions_of_the_bundle_opened_again(
    served, monkeypatch
) -> None:
    with served.models.using("b@ink") as ink:
        first = served.submit(ink, 1).wait()
        session = ink.pipeline.sessions[DENOISER].base

        def crash(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            raise RuntimeError("planted")

        monkeypatch.setattr(session, "run", crash)
        assert isinstance(served.submit(ink, 1).wait(), Refused)
        again = served.submit(ink, 1).wait()
        np.testing.assert_array_equal(*(np.asarray(end.images[0]) for end in (first, again)))
        assert ink.pipeline.sessions[DENOISER].base is not session


def test_a_lora_that_is_gone_when_the_bundle_is_opened_fails_alone(lora_inputs_bundle, choices, load) -> None:
    served = Served(lora_inputs_bundle, choices, load, most=8)
    choices["ink"].file.unlink()
    try:
        with served.models.using("b@sepia") as sepia:
            assert isinstance(served.submit(sepia, 1).wait(), Finished)
        lost = pytest.raises(Refusal, match="its LoRA could not be read")
        with lost as refused, served.models.using("b@ink"):
            pass
        assert refused.value.status == 503
        states = {state.name: state.state for state in served.models.states()}
        assert states == {"b": "ready", "b@sepia": "ready", "b@ink": "failed"}
        assert served.models.ready and served.models.opened("b@ink") is None
        assert served.models.reload() == {"b": "unchanged"}
        with pytest.raises(Refusal) as unknown, served.models.using("b@oil"):
            pass
        assert unknown.value.status == 404 and "b@ink" in str(unknown.value.hint)
    finally:
        served.models.close()


def test_loras_that_cannot_be_inputs_are_models_of_their_own(
    tiny_bundle, lora_inputs_bundle, tmp_path
) -> None:
    load = LoadOptions(backend="onnxruntime", threads=1)
    plain, dora = LoraChoice(lora(tmp_path / "a", 0)), LoraChoice(lora(tmp_path / "d", 0, dora=True))
    found = lora_variants(
        {"old": tiny_bundle, "new": lora_inputs_bundle}, {"plain": plain, "dora": dora}, load
    )
    assert found == {
        "old@plain": ServedLora("old", plain, shares=False),
        "new@plain": ServedLora("new", plain, shares=True),
        "old@dora": ServedLora("old", dora, shares=False),
        "new@dora": ServedLora("new", dora, shares=False),
    }
    over_ray = lora_variants({"new": lora_inputs_bundle}, {"plain": plain}, load, share=False)
    assert over_ray == {"new@plain": ServedLora("new", plain, shares=False)}
