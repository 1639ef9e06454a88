"""The training loop on a tiny model: it stops on a signal, resumes exactly, and refuses a broken state."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from demo.errors import DemoError
from demo.train.loop import Job, Stopped, save_fresh_state, train
from demo.train.muon import Muon, orthogonalized


def _job(cache: Path, steps: int, stop_at: int | None = None) -> Job:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    calls = 0

    def loss(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(8, 4, generator=generator)
        return (model(x) - x).square().mean()

    adam = torch.optim.AdamW([model.bias], 0.05)
    return Job(
        name="tiny",
        cache=cache,
        log=cache / "log.jsonl",
        model=model,
        optimizers=[Muon([model.weight], 0.05), adam],
        loss=loss,
        evaluate=lambda m: {"error": float((m.weight - torch.eye(4)).abs().max())},
        steps=steps,
        warmup=5,
        average=0.9,
    )


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = train(_job(whole, 40))
    with pytest.raises(Stopped, match="step 15 of 40"):
        train(_job(parts, 40, stop_at=15))
    resumed = train(_job(parts, 40))
    torch.testing.assert_close(resumed.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_training_reaches_the_answer_and_logs_it(tmp_path: Path) -> None:
    train(_job(tmp_path, 300))
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert (last["job"], last["step"]) == ("tiny", 300)
    assert last["error"] < 0.05


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(_job(tmp_path, 10))
    again = train(_job(tmp_path, 10))
    torch.testing.assert_close(again.state_dict(), first.state_dict())


def test_training_goes_on_from_weights_alone(tmp_path: Path) -> None:
    weights = nn.Linear(4, 4)
    torch.nn.init.eye_(weights.weight)
    torch.nn.init.zeros_(weights.bias)
    save_fresh_state(tmp_path, "tiny", weights)
    trained = train(_job(tmp_path, 20))
    assert (trained.weight - torch.eye(4)).abs().max() < 0.2  # a fresh start is 1 away from it


def test_a_broken_state_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tiny.pt").write_bytes(b"not a state")
    with pytest.raises(DemoError, match=r"tiny.pt cannot be read.*hint: delete"):
        train(_job(tmp_path, 10))


def test_a_full_disk_leaves_the_last_state_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(_job(tmp_path, 10))
    before = (tmp_path / "tiny.pt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DemoError, match=r"No space left.*hint: free"):
        train(_job(tmp_path, 20))
    assert [f.name for f in tmp_path.glob("tiny*")] == ["tiny.pt"]
    assert (tmp_path / "tiny.pt").read_bytes() == before


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4)])
def test_an_orthogonalized_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.5 and values.max() < 1.3  # the quintic is tuned for speed, not for exact ones
