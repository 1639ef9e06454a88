"""The comparison with other libraries: real workers over the tiny checkpoint, and the arithmetic of its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peer_cases import ALL, BASELINE, CONTESTANTS, FASTER, Case, Contestant, Model, cases
from benchmarks.peer_models import environment
from benchmarks.peer_race import Race, Worker, WorkerError
from benchmarks.peer_report import summary, table

OURS, PEER = "ditc onnxruntime fp32", "optimum-intel bf16"


@pytest.fixture
def case(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> Case:
    """All operations, on the tiny checkpoint. Its bundle lies where the race looks for it."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "ditc-onnxruntime").symlink_to(tiny_bundle)
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "max_sequence_length": 12}
    return Case(
        name="tiny",
        title="The tiny checkpoint",
        model=Model(name="tiny", source=tiny_checkpoint, pixels_per_cell=2, latent_channels=8),
        pixels=64,
        operations={
            "picture": {"do": "draw", "prompt": None, **call},
            "step": {"do": "step", "prompt": "red cat", **call},
            "decode": {"do": "decode"},
        },
    )


def race(case: Case, cache: Path, *names: str, key: str = "") -> Race:
    named = [c for c in CONTESTANTS if c.name in names]
    return Race(case, named, cache, None, threads=1, key=key, noisy=True)


def test_a_race_compares_with_diffusers_and_goes_on_where_it_was_stopped(case: Case, tmp_path: Path) -> None:
    assert not race(case, tmp_path, OURS, PEER).run(2, seconds=0, at_once=2)  # no round begins
    again = race(case, tmp_path, OURS, PEER)
    again.run(1, seconds=60, at_once=2)
    assert "--make-peer-env" in again.state["failed"][PEER]
    result = summary(again.state)
    drawn = {operation: rows[OURS] for operation, rows in result["operations"].items()}
    assert drawn["picture"]["psnr_db"]["worst"] > 45  # the promise of the README
    assert drawn["step"]["relative_l2"]["worst"] < 1e-4
    assert drawn["decode"]["relative_l2"]["worst"] < 1e-4
    assert all(row["seconds"]["median"] > 0 for row in drawn.values())
    assert result["loaded"][OURS]["peak_mb"] > 10
    assert f"not measured: {PEER}" in table(case.title, result)
    # One round is there, so a race for one round starts no process; with other code or options nothing is there.
    third = race(case, tmp_path, OURS)
    third._worker = None  # type: ignore[method-assign, assignment]
    assert third.run(1, seconds=60, at_once=2)
    assert race(case, tmp_path, OURS, key="other").state["rounds"] == []


def test_a_worker_says_why_it_cannot_answer(tmp_path: Path) -> None:
    def worker(**settings: object) -> Worker:
        return Worker(Path(sys.executable), settings, tmp_path / "log", environment(bare=False))

    missing = {"kind": "ditc", "backend": "onnxruntime", "precision": "fp32", "threads": 1}
    with (
        worker(model=str(tmp_path / "nothing"), **missing) as one,
        pytest.raises(WorkerError, match="nothing"),
    ):
        one.answer()
    with worker(kind="unknown") as one, pytest.raises(WorkerError, match="unknown"):
        one.answer()
    with worker() as one, pytest.raises(WorkerError):
        one.ask({"do": "decode"})


def test_the_table_forms_ratios_within_rounds() -> None:
    rounds = [
        {
            "operations": {"step": {BASELINE: slow, OURS: fast}},
            "fidelity": {"step": {OURS: {"relative_l2": error}}},
            "counts": True,
        }
        for slow, fast, error in ((0.2, 0.1, 1e-3), (0.9, 0.3, 3e-3), (0.4, 0.1, 2e-3))
    ]
    # A heat without the baseline, and a round during which other programs ran.
    rounds.append({"operations": {"step": {PEER: 0.05}}, "fidelity": {}, "counts": True})
    rounds.append({"operations": {"step": {PEER: 9.0}}, "fidelity": {}, "counts": False})
    state = {"rounds": rounds, "loaded": {OURS: {"peak_mb": 150.2, "starts": []}}, "failed": {"x": "no room"}}
    result = summary(state)
    ours = result["operations"]["step"][OURS]
    assert ours["times_as_fast"]["median"] == pytest.approx(3)
    assert ours["relative_l2"] == {"mean": pytest.approx(2e-3), "worst": 3e-3, "compared": 3}
    assert "times_as_fast" not in result["operations"]["step"][PEER]
    lines = table("A step", result).splitlines()
    assert lines[0] == "**A step**"
    assert lines[4].startswith(f"| {PEER} | 50.0 |")  # fastest first
    assert lines[5] == f"| {OURS} | 100.0 | 100.0..260.0 | 3 | 3.00 | 2.0e-03 | 150 |  |"
    assert lines[-2].startswith("1 more rounds are not counted")
    assert lines[-1] == "- not measured: x: no room"


def test_every_case_names_contestants_of_the_table() -> None:
    assert len(set(ALL)) == len(CONTESTANTS)
    assert BASELINE in FASTER and set(FASTER) < set(ALL)
    for case in cases(4, 2).values():
        assert BASELINE in case.contestants and set(case.contestants) <= set(ALL)
    assert {c.build for c in CONTESTANTS} == {
        *("", "ditc-onnxruntime", "ditc-openvino", "optimum-f32", "optimum-int8")
    }
    assert isinstance(CONTESTANTS[0], Contestant)
