"""Files of ranges: a saved file loads the same, merged files add up, and files that do not fit are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from quant_helpers import ORIGIN, prompt, statistics

from ditc.export.quant.ranges import Ranges, load_ranges, merge_ranges, save_ranges
from ditc.runtime.errors import UsageError


def ranges(seed: int = 0, **changes) -> Ranges:
    x = np.random.default_rng(seed).standard_normal((2, 50, 4)).astype(np.float32)
    made = Ranges(
        origin=ORIGIN,
        sites={"a": statistics(x[0], x[1])},
        site_of={"a": "a", "b": "a"},
        prompts=(prompt(f"prompt {seed}"),),
    )
    return replace(made, **changes)


def test_loaded_ranges_equal_the_saved_ones(tmp_path):
    saved = ranges()
    loaded = load_ranges(save_ranges(saved, tmp_path / "r.safetensors"), identity=ORIGIN.identity)
    assert (loaded.origin, loaded.site_of, loaded.prompts) == (saved.origin, saved.site_of, saved.prompts)
    np.testing.assert_array_equal(loaded.of("b").histogram, saved.sites["a"].histogram)
    np.testing.assert_array_equal(loaded.of("b").channel_squares, saved.sites["a"].channel_squares)


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    path = save_ranges(ranges(), tmp_path / "r.safetensors")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that refuses even root's files")
def test_a_folder_that_takes_no_file_is_an_error_with_a_hint():
    with pytest.raises(UsageError, match="cannot write /proc/r") as error:
        save_ranges(ranges(), Path("/proc/r.safetensors"))  # safetensors raises an error class of its own
    assert error.value.hint == "choose another -o"


def test_ranges_of_another_checkpoint_are_refused(tmp_path):
    path = save_ranges(ranges(), tmp_path / "r.safetensors")
    with pytest.raises(UsageError, match="measured on other weights") as error:
        load_ranges(path, identity="f" * 64)
    assert "ditc calibrate" in error.value.hint


def test_a_missing_layer_is_named():
    with pytest.raises(UsageError, match="no statistics of c"):
        ranges().of("c")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_cannot_be_magnitudes_are_refused_by_name(tmp_path, value):
    made = ranges()
    made.sites["a"].amax[1] = value
    path = save_ranges(made, tmp_path / "r.safetensors")
    with pytest.raises(UsageError, match="amax of a is negative, NaN or infinite"):
        load_ranges(path)


def test_counts_of_another_number_of_channels_are_refused(tmp_path):
    made = ranges()
    statistics_of_a = replace(made.sites["a"], channel_histogram=made.sites["a"].channel_histogram[:3])
    path = save_ranges(replace(made, sites={"a": statistics_of_a}), tmp_path / "r.safetensors")
    with pytest.raises(UsageError, match="channel_histogram of a is"):
        load_ranges(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_file_that_is_not_whole_or_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "r.safetensors"
    if content is None:
        path.write_bytes(save_ranges(ranges(), tmp_path / "whole.safetensors").read_bytes()[:-100])
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="not a whole file of ranges"):
        load_ranges(path)


def test_merging_adds_counts_and_takes_the_larger_amax():
    one, two = ranges(1), ranges(2)
    merged = merge_ranges([one, two]).sites["a"]
    np.testing.assert_array_equal(merged.histogram, one.sites["a"].histogram + two.sites["a"].histogram)
    np.testing.assert_array_equal(merged.amax, np.maximum(one.sites["a"].amax, two.sites["a"].amax))


def test_merging_refuses_the_same_prompt_twice_and_other_settings():
    with pytest.raises(UsageError, match="same prompt"):
        merge_ranges([ranges(1), ranges(1)])
    with pytest.raises(UsageError, match="num_inference_steps"):
        merge_ranges([ranges(1), ranges(2, origin=replace(ORIGIN, num_inference_steps=9))])


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("amax", lambda a: a[:, None], r"amax of a is \(2, 1\)"),
        ("rows", lambda a: np.array(3), "lacks rows of a"),
        ("channel_amax", lambda a: a[:, 0], r"channel_amax of a is \(2,\)"),
        ("channel_squares", lambda a: a[:, :-1], r"channel_squares of a is \(2, 3\)"),
        ("histogram", lambda a: a.astype(bool), "histogram of a is .* of bool"),
    ],
)
def test_statistics_of_another_form_are_refused_by_name(tmp_path, field, change, message):
    made = ranges()
    changed = replace(made.sites["a"], **{field: change(getattr(made.sites["a"], field))})
    path = save_ranges(replace(made, sites={"a": changed}), tmp_path / "r.safetensors")
    with pytest.raises(UsageError, match=message):
        load_ranges(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"origin": replace(ORIGIN, buckets=0)}, "buckets is 0"),
        ({"origin": replace(ORIGIN, num_inference_steps=10**9)}, "num_inference_steps is 1000000000"),
        ({"origin": replace(ORIGIN, guidance_scale=np.nan)}, "guidance_scale: nan is not a finite number"),
        ({"site_of": {"a": 3}}, "expected str"),
    ],
)
def test_facts_that_cannot_be_are_refused_by_name(tmp_path, changes, message):
    path = tmp_path / "r.safetensors"
    save_ranges(replace(ranges(), **changes), path)
    with pytest.raises(UsageError, match=message):
        load_ranges(path)
