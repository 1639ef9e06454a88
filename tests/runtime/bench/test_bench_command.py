"""`ditc bench`: what it measures, what it keeps in the bundle, and what it refuses before any work."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ditc.runtime.bench.profile_page import page
from ditc.runtime.bundle.bench_record import BENCHMARK, Measured, find_entry, read_record, save_entry
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import choose_here
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.serving.model import recorded_times
from ditc.runtime.serving.scheduling.step_times import TEXT, StepTimes
from ditc.runtime.serving.scheduling.warm_up import begin_with
from ditc.runtime.spec import DENOISER, VAE_DECODER, Precision


@pytest.fixture(scope="module")
def measured(openvino_bundle: Path, tmp_path_factory: pytest.TempPathFactory):
    """A copy of the bundle with a record, and what was printed as JSON."""
    bundle = Path(shutil.copytree(openvino_bundle, tmp_path_factory.mktemp("bench") / "bundle"))
    size = str(load_manifest(bundle).defaults.height)
    arguments = ["--size", size, "--batch", "1,2", "--steps", "2", "--threads", "1"]
    few = ["--repeats", "2", "--warmup", "0", "--loads", "1", "--record", "--profile", "--json"]
    printed = pytest.MonkeyPatch()
    out: list[str] = []
    printed.setattr("sys.stdout.write", out.append)
    for name, small in (("ROWS", 64), ("WIDTH", 256), ("COPIED_BYTES", 2**20)):
        printed.setattr(f"ditc.runtime.bench.ceilings.{name}", small)
    try:
        assert main(["bench", str(bundle), *arguments, *few]) == 0
    finally:
        printed.undo()
    return bundle, json.loads("".join(out))


def test_every_candidate_case_and_stage_is_measured(measured) -> None:
    bundle, report = measured
    stages = {spec.stage for spec in load_manifest(bundle).text} | {"conditioner", DENOISER, VAE_DECODER}
    assert {c["name"] for c in report["candidates"]} == {"onnxruntime fp32", "openvino fp32"}
    for candidate in report["candidates"]:
        assert [(c["batch"], c["steps"]) for c in candidate["cases"]] == [(1, 2), (2, 2)]
        assert candidate["load_s"][0] > 0 and candidate["first_picture_s"][0] > 0
        for case in candidate["cases"]:
            assert case["stages"].keys() == stages
            assert case["new_prompt"]["repeats"] == case["cached_prompt"]["repeats"] == 2
            assert case["stages"][DENOISER]["repeats"] == 2 * 2 * 2  # modes, drawings, steps
            assert case["stages"]["conditioner"]["repeats"] == 2  # with a new prompt only
            assert all(row["flops"] > 0 and row["gemm_share"] > 0 for row in case["stages"].values())


def test_the_time_of_every_stage_is_told_by_module(measured) -> None:
    _, report = measured
    assert [profile["name"] for profile in report["profiles"]] == ["onnxruntime fp32", "openvino fp32"]
    for profile in report["profiles"]:
        assert profile["stages"].keys() == report["candidates"][0]["stages"].keys()
        modules = {each["module"]: each["seconds"] for each in profile["stages"][DENOISER]["modules"]}
        for part in ("attn1.to_q", "attn2.to_out.0", "ff.conv_point"):
            assert sum(path.endswith(f"transformer_blocks.1.{part}") for path in modules) == 1
        assert sum(modules.values()) == pytest.approx(profile["stages"][DENOISER]["nodes_s"])


def test_the_page_holds_the_profiles_and_no_markup_of_others(measured) -> None:
    _, report = measured
    report = json.loads(json.dumps(report))
    report["profiles"][0]["name"] = "</script><script>alert(1)"
    text = page(report)
    assert "alert" in text and "<script>alert" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    stages = json.loads(data[1])
    assert [c["name"] for c in stages[0]["candidates"]] == ["</script><script>alert(1)", "openvino fp32"]
    assert "http" not in text.replace("http-equiv", "")  # it loads nothing


def test_a_batch_of_two_does_twice_the_work(measured) -> None:
    _, report = measured
    one, two = (case["stages"] for case in report["candidates"][0]["cases"])
    for stage in (VAE_DECODER, "conditioner"):
        assert two[stage]["flops"] == 2 * one[stage]["flops"]


def test_the_record_is_found_by_a_machine_of_the_same_kind(measured, monkeypatch) -> None:
    bundle, report = measured
    manifest = load_manifest(bundle)
    entry = find_entry(bundle, manifest, threads=1)
    assert entry is not None and report["recorded"] == str(bundle / BENCHMARK)
    kept = entry.candidate("openvino", Precision.FP32)
    printed = next(c for c in report["candidates"] if c["backend"] == "openvino")
    assert kept is not None
    assert kept.cases[1].new_prompt.median_s == printed["cases"][1]["new_prompt"]["median_s"]
    assert find_entry(bundle, manifest, threads=7) is None
    monkeypatch.setattr("ditc.runtime.bundle.bench_record.library_version", lambda name: "0.1")
    assert find_entry(bundle, manifest, threads=1) is None
    monkeypatch.undo()
    monkeypatch.setattr("ditc.runtime.bundle.bench_record.cpu_features", lambda: ("sse",))
    assert find_entry(bundle, manifest, threads=1) is None


def test_a_record_that_was_changed_is_ignored(measured, tmp_path: Path, caplog) -> None:
    bundle, _ = measured
    manifest = load_manifest(bundle)
    text = (bundle / BENCHMARK).read_text()
    for changed in (text.replace('"median_s": ', '"median_s": 1'), "[]", "{", text[:-2], "[" * 100_000):
        (tmp_path / BENCHMARK).write_text(changed)
        assert find_entry(tmp_path, manifest, threads=1) is None
    assert "its digest does not fit; it is ignored" in caplog.text


def test_a_second_run_replaces_the_entry(measured, tmp_path: Path) -> None:
    bundle, _ = measured
    manifest = load_manifest(bundle)
    entry = find_entry(bundle, manifest, threads=1)
    assert entry is not None
    for _ in range(2):
        save_entry(tmp_path, manifest, entry)
    record = read_record(tmp_path)
    assert record is not None and record.entries == (entry,)


@pytest.mark.parametrize("fastest", ["onnxruntime", "openvino"])
def test_auto_takes_what_was_faster_here(measured, tmp_path: Path, fastest: str) -> None:
    bundle, _ = measured
    manifest, options = load_manifest(bundle), LoadOptions(threads=1)
    entry = find_entry(bundle, manifest, threads=1)
    assert entry is not None
    save_entry(tmp_path, manifest, replace(entry, candidates=tuple(slowed(entry.candidates, fastest))))
    chosen, reason = choose_here(tmp_path, manifest, options)
    assert chosen[DENOISER].backend == fastest
    assert "by the bundle's record of 20" in reason
    named, _ = choose_here(tmp_path, manifest, replace(options, backend="openvino"))
    assert named[DENOISER].backend == "openvino"


def slowed(candidates: tuple[Measured, ...], fastest: str) -> Iterator[Measured]:
    """The candidates, as if all but one took an hour longer."""
    for measured in candidates:
        more = 0.0 if measured.backend == fastest else 3600.0
        cases = [
            replace(
                case,
                new_prompt=replace(
                    case.new_prompt,
                    median_s=case.new_prompt.median_s + more,
                    p90_s=case.new_prompt.p90_s + more,
                ),
            )
            for case in measured.cases
        ]
        yield replace(measured, cases=tuple(cases))


def test_a_server_begins_with_the_recorded_times(measured) -> None:
    bundle, _ = measured
    load = LoadOptions(threads=1, backend="onnxruntime")
    with Pipeline.load(bundle, options=load) as pipeline:
        recorded = recorded_times(bundle, pipeline, load)
        assert recorded is not None and recorded.backend == "onnxruntime"
        times = StepTimes(max_batch=1)
        begin_with(pipeline, times, recorded)
        one = recorded.cases[0]
        (sizes,) = times.measured().values()
        assert sizes == {1: one.stages[DENOISER].median_s}  # a batch of 2 is more than this server runs
        assert times.stage_seconds(VAE_DECODER, one.height * one.width) > 0
        assert times.stage_seconds(TEXT, 1) > 0
        begin_with(pipeline, untouched := StepTimes(max_batch=1), None)
        assert untouched.measured() == {}


WRONG = [
    (["--backend", "tensorflow"], "backend 'tensorflow' is unknown"),
    (["--precision", "int4"], "precision 'int4' is unknown"),
    (["--precision", "int8"], "the bundle has no denoiser for precision int8 among those asked for"),
    (["--backend", "openvino"], "the bundle has no denoiser for backend openvino among those asked for"),
    (["--size", "7"], "height 7 is not a multiple"),
    (["--size", "512by512"], "size '512by512' is not a size"),
    (["--size", "999999"], "height 999999 is not a multiple"),
    (["--batch", "0"], "batch 0 is not from 1 to"),
    (["--batch", "1,100000"], "batch 100000 is not from 1 to"),
    (["--steps", "0"], "steps 0 is not from 1 to"),
    (["--steps", "two"], "must be whole numbers"),
    (["--backend", ","], "has an empty entry"),
    (["--html", "page.html"], "--html shows profiles, and none is made"),
    (["--repeats", "0"], "--repeats 0 is not from 1 to"),
    (["--provider", "cuda", "--backend", "openvino"], "has no denoiser for backend openvino"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_bad_input_is_refused_before_any_work(
    tiny_bundle: Path, arguments: list[str], message: str, monkeypatch, capsys
) -> None:
    def must_not_run(*_: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("ditc.runtime.bench.ceilings.measure_ceilings", must_not_run)
    assert main(["bench", str(tiny_bundle), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "hint: " in error


def test_too_few_prompts_are_refused(tiny_bundle: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\na\n")
    assert main(["bench", str(tiny_bundle), "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "2 different prompts are too few: 16 pictures" in capsys.readouterr().err


def test_a_process_that_dies_is_an_error_with_its_last_words(
    tiny_bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    from ditc.runtime.bench import process
    from ditc.runtime.bench.choices import select_candidates
    from ditc.runtime.errors import SessionError

    (tmp_path / "unlucky.py").write_text("import sys; sys.stdin.readline(); sys.exit('out of luck')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(process, "WORKER", "unlucky")
    (candidate,) = select_candidates(load_manifest(tiny_bundle), [], [], LoadOptions())
    with pytest.raises(
        SessionError, match="onnxruntime fp32: its process ended with exit code 1: out of luck"
    ):
        process.Process(candidate, tiny_bundle)


def test_an_error_in_the_process_keeps_its_class_and_hint(tiny_bundle: Path, tmp_path: Path) -> None:
    from ditc.runtime.bench.choices import select_candidates
    from ditc.runtime.bench.process import Process
    from ditc.runtime.errors import BundleError

    (candidate,) = select_candidates(load_manifest(tiny_bundle), [], [], LoadOptions())
    with pytest.raises(BundleError, match=r"onnxruntime fp32: .* is not a bundle") as error:
        Process(candidate, tmp_path)
    assert error.value.hint
