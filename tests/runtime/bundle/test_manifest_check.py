"""A sealed manifest may hold any number of the right type. Values that nothing can be drawn with are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime.bundle.jsondata import digest_of, serialize
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import BundleError

Keys = tuple[str | int, ...]
PROFILE = ("stages", "denoiser", "artifacts", 0, "spec", "profile")
SPEC = ("stages", "denoiser", "artifacts", 0, "spec")


def sealed_with(bundle: Path, out: Path, keys: Keys, change: Any) -> Path:
    """A folder with the bundle's manifest, in which one value is changed, and which is sealed again."""
    data = json.loads((bundle / "manifest.json").read_text())
    *parents, last = keys
    owner = data
    for key in parents:
        owner = owner[key]
    owner[last] = change(owner[last]) if isinstance(change, Callable) else change
    digest = digest_of({**data, "digest": ""})
    (out / "manifest.json").write_bytes(serialize({**data, "digest": digest}))
    return out


@pytest.mark.parametrize(
    ("keys", "change", "message"),
    [
        # A negative batch drew no picture and ended with 0; NaN drew unguided; the table took 4.6 GB.
        ((*PROFILE, "batch", "max"), -1, r"denoiser.*profile.batch: min 1, opt 1, max -1 do not ascend"),
        (("defaults", "guidance_scale"), float("nan"), r"\$.defaults.guidance_scale: nan is not a finite"),
        (("golden_table", "num_inference_steps"), 200_000_000, "golden_table.num_inference_steps: 200000000"),
        ((*PROFILE, "batch", "max"), 2**40, "profile.batch: .*at most 4096"),
        ((*PROFILE, "height", "min"), 0, "profile.height: min 0"),
        ((*PROFILE, "height", "opt"), 1, "do not ascend"),
        ((*PROFILE, "height", "multiple_of"), 0, "are not multiples of 0"),
        ((*PROFILE, "width"), lambda old: {**old, "multiple_of": 3}, "are not multiples of 3"),
        (PROFILE, lambda old: {k: v for k, v in old.items() if k != "batch"}, "no range of 'batch'"),
        ((*SPEC, "inputs", 0, "name"), "noise", "latents must be .* but is None"),
        ((*SPEC, "inputs", 6, "name"), "x", "nothing gives it 'x'"),
        ((*SPEC, "inputs", 5, "shape", 1), "rows", "history holds 'rows' states"),
        ((*SPEC, "inputs", 0, "shape", 1), -8, "-8 is not between 0"),
        ((*SPEC, "name"), "vae_decoder", "the spec is of the stage 'vae_decoder'"),
        (("stages", "denoiser", "artifacts"), [], r"\$.stages.denoiser: the stage has no artifact"),
        (("stages", "vae_decoder", "artifacts", 0, "spec", "outputs", 0, "shape", 1), 4, "pictures of 3"),
        (("defaults", "height"), 10**400, r"\$.defaults.height: an integer of 1329 bits"),
        (("defaults", "height"), 10**6, "defaults.height: 1000000 is not between 1 and"),
        (("defaults", "num_inference_steps"), 0, "defaults.num_inference_steps: 0 is not between 1"),
        (("defaults", "bins"), [[64, 0]], "defaults.bins: 0 is not between 1"),
        (("defaults", "tiling"), {"tile": 64, "stride": 0}, "tiling.stride: 0 is not between"),
        (("latents", "channels"), 0, "latents.channels: 0 is not between"),
        (("latents", "scale_factor"), 0, "latents.scale_factor: 0 is not between"),
        (("latents", "rgb"), lambda old: [old[0], old[1], old[2][:-1]], "rgb: rows of .* are no 3x"),
        (("scheduler", "num_train_timesteps"), 0, "num_train_timesteps: 0 is not between"),
        (("scheduler", "shift"), 0.0, "scheduler.shift: 0.0 is not between"),
        (("scheduler", "sigma_min"), 2.0, "scheduler.sigma_min: 2.0 is not between 0 and"),
        (("scheduler", "spacing"), "exponential", "spacing_min: 0.0 and 1.0 do not ascend from above 0"),
        (("golden_table", "coefficients"), lambda old: old[1:], "3 rows for 4 timesteps"),
        (("golden_table", "coefficients", 0), [1.0], r"rows of \[1, 6\] values, where 6 are needed"),
        (
            ("stages", "text_encoder", "artifacts", 0, "spec", "inputs", 0, "shape"),
            ["batch"],
            r"text_encoder: input_ids is \('batch',\)",
        ),
        (("text",), [], r"\$.text: 0 is not between 1 and 3"),
        (("text", 0, "stage"), "nowhere", "there is no stage 'nowhere'"),
        (("text", 0, "pad_token_id"), -1, "pad_token_id: -1 is not between"),
        (("text", 0, "prefix"), "x" * 100_000, "prefix: 100000 is not between"),
        (("text", 0, "mask"), None, "conditioner: nothing gives it 'text_mask'"),
        (
            ("text", 0, "padding"),
            [["nope", 0.0]],
            r"text\[0\].padding: it is for nope, but cross_kv, text_bias grow",
        ),
        (("text", 0, "padding"), lambda old: old[:1], "it is for cross_kv, but cross_kv, text_bias grow"),
        (("files", 0, "size_bytes"), -1, "cannot have -1 bytes"),
        (("files", 0, "sha256"), "x", "no SHA-256"),
        (("scheduler", "sigma_max"), float("inf"), "sigma_max: inf is not a finite number"),
    ],
)
def test_values_without_a_meaning_are_refused_by_name(
    tiny_bundle: Path, tmp_path: Path, keys: Keys, change: Any, message: str
) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        load_manifest(sealed_with(tiny_bundle, tmp_path, keys, change))
    assert "rebuild" in str(caught.value.hint)


NEXT = ("stages", "vae_decoder_next", "artifacts", 0, "spec")


@pytest.mark.parametrize(
    ("keys", "change", "message"),
    [
        (("defaults", "frames"), 10, r"defaults.frames: 10 is not 1 \+ k \* 4"),
        (("defaults", "frames"), 10**6, "defaults.frames: 1000000 is not between 1 and"),
        (("defaults", "fps"), 0, "defaults.fps: 0 is not between 1 and"),
        (("defaults", "tiling"), {"tile": 6, "stride": 4}, "they are no multiples of 4 pixels"),
        (("latents", "frames_per_cell"), 2, "not a latent frame into 2 frames"),
        (("latents", "frames_per_cell"), 0, "frames_per_cell: 0 is not between"),
        (("latents",), lambda old: {k: v for k, v in old.items() if k != "frames_per_cell"}, "does not fit"),
        (
            ("stages",),
            lambda old: {k: v for k, v in old.items() if k != "vae_decoder_next"},
            "there is no vae_decoder_next",
        ),
        ((*NEXT, "inputs", 1, "shape", 1), 7, "does not hand on what the next frame needs"),
        ((*NEXT, "inputs"), lambda old: [*old[:2], *old[3:]], "does not hand on"),
        ((*NEXT, "outputs", 0, "shape", 2), 8, "not a latent frame into 4 frames"),
        (("text", 0, "motion"), "x" * 100_000, "motion: 100000 is not between"),
    ],
)
def test_values_of_videos_without_a_meaning_are_refused_by_name(
    video_bundle: Path, tmp_path: Path, keys: Keys, change: Any, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        load_manifest(sealed_with(video_bundle, tmp_path, keys, change))


def test_text_lengths_beyond_all_models_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    def longer(spec: dict[str, Any]) -> dict[str, Any]:
        return {**spec, **dict.fromkeys(("length", "max_length", "negative_max_length"), 2**40)}

    with pytest.raises(BundleError, match=r"text\[0\].length: 1099511627776 is not between 1 and"):
        load_manifest(sealed_with(tiny_bundle, tmp_path, ("text", 0), longer))


def test_text_that_has_no_encoding_and_deep_nesting_are_not_json(tmp_path: Path) -> None:
    for content in ('{"schema_version": 1, "family": "\\ud800"}', '{"a":' * 5000 + "1" + "}" * 5000):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(BundleError, match="is not JSON"):
            load_manifest(tmp_path)


def test_the_bundles_of_every_family_pass(tiny_bundle: Path, sd3_bundle: Path, mmdit_bundle: Path) -> None:
    for bundle in (tiny_bundle, sd3_bundle, mmdit_bundle):
        assert load_manifest(bundle).stages
