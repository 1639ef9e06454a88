"""The training loop of all steps: resuming, warm-up and decay, moving average, progress bar, log, stop on a signal.

The state is written to ``<cache>/<name>.pt`` when a signal (SIGTERM, SIGINT) arrives, every few minutes, and at the
end. The same command resumes from it. The random numbers of a step depend on its index alone, so a run that was stopped
and resumed draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import copy
import json
import pickle
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from demo.errors import DemoError, explained
from ditc.runtime.atomic import atomic_path

_SAVE_EVERY_S = 300
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to train and for how long.

    Args:
        loss: draws one batch with the given generator and returns its loss.
        evaluate: computes numbers for the log from the model with averaged weights.
        decay: the last share of the steps, over which the learning rate falls linearly to a fiftieth.
        average: decay of the moving average of the weights.
    """

    name: str
    cache: Path
    log: Path
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[torch.Generator], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    steps: int
    warmup: int = 100
    decay: float = 0.3
    average: float = 0.999
    evaluate_every: int = 500
    seed: int = 0


class Stopped(Exception):
    """A signal stopped the run, after its state was saved."""


def train(job: Job) -> nn.Module:
    """Run the job to its last step and return the averaged model.

    Raises:
        Stopped: a signal stopped the run, after its state was saved.
        DemoError: the state cannot be read or written, or the loss is not finite.
    """
    averaged = copy.deepcopy(job.model).eval().requires_grad_(False)
    step, seconds = _resume(job, averaged)
    base_lrs = [[g["lr"] for g in o.param_groups] for o in job.optimizers]
    _write_log(job, {"begins_at_step": step, "of": job.steps, "lr": base_lrs[0][0], **_environment()})
    started = saved = time.monotonic()
    running = float("nan")
    with (
        _StopSignal() as stop,
        tqdm(total=job.steps, initial=step, desc=job.name, unit="step", mininterval=5) as bar,
    ):
        while step < job.steps:
            value = _step(job, averaged, step, base_lrs)
            running = value if running != running else running * 0.99 + value * 0.01
            step += 1
            bar.update()
            now = time.monotonic()
            at_end = step == job.steps or stop.asked
            if at_end or now - saved > _SAVE_EVERY_S:
                _save(job, averaged, step, seconds + now - started)
                saved = now
            if at_end or step % job.evaluate_every == 0:
                _log(job, averaged, step, seconds + now - started, running)
            bar.set_postfix(loss=f"{running:.4f}", refresh=False)
            if stop.asked:
                raise Stopped(
                    f"{job.name} stopped at step {step} of {job.steps}; run the same command again to resume."
                )
    return averaged


def load_averaged(cache: Path, name: str, model: nn.Module) -> nn.Module:
    """Load the averaged weights of a saved run into the model.

    Raises:
        DemoError: there is no saved run, or it cannot be read.
    """
    path = cache / f"{name}.pt"
    if not path.is_file():
        raise DemoError(f"{path} is missing.", f"run that step first: python -m demo.train {name}")
    model.load_state_dict(_read(path)["averaged"])
    return model.eval().requires_grad_(False)


def _step(job: Job, averaged: nn.Module, step: int, base_lrs: list[list[float]]) -> float:
    factor = _lr_factor(step, job)
    for optimizer, lrs in zip(job.optimizers, base_lrs, strict=True):
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * factor
    loss = job.loss(torch.Generator().manual_seed(job.seed * 1_000_003 + step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(job.model.parameters(), _MAX_GRAD_NORM)
    for optimizer in job.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    value = float(loss.detach())
    if value != value:
        raise DemoError(f"{job.name}: the loss is not a number at step {step}.", "lower the learning rate.")
    decay = min(job.average, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), list(job.model.parameters()), 1 - decay)
    return value


def _lr_factor(step: int, job: Job) -> float:
    left = (job.steps - step) / max(1.0, job.decay * job.steps)
    return min(1.0, (step + 1) / job.warmup, max(0.02, left))


def _save(job: Job, averaged: nn.Module, step: int, seconds: float) -> None:
    state = {
        "step": step,
        "seconds": seconds,
        "model": job.model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizers": [o.state_dict() for o in job.optimizers],
    }
    _write(state, job.cache / f"{job.name}.pt")


def save_fresh_state(cache: Path, name: str, model: nn.Module) -> None:
    """Save weights as a state at step 0 without optimizers, so that training from it begins with a warm-up."""
    weights = model.state_dict()
    state = {"step": 0, "seconds": 0.0, "model": weights, "averaged": weights, "optimizers": None}
    _write(state, cache / f"{name}.pt")


def _write(state: dict[str, Any], path: Path) -> None:
    """Write a state atomically: if writing fails, the previous state is intact."""
    with explained(), atomic_path(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as e:  # torch raises it when the disk is full
            raise OSError(str(e)) from e


def _resume(job: Job, averaged: nn.Module) -> tuple[int, float]:
    path = job.cache / f"{job.name}.pt"
    if not path.is_file():
        return 0, 0.0
    state = _read(path)
    job.model.load_state_dict(state["model"])
    averaged.load_state_dict(state["averaged"])
    if state["optimizers"] is None:
        return state["step"], state["seconds"]
    for optimizer, saved in zip(job.optimizers, state["optimizers"], strict=True):
        lrs = [g["lr"] for g in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
    return state["step"], state["seconds"]


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise DemoError(
            f"{path} cannot be read ({type(e).__name__}).", f"delete {path} to restart this step."
        ) from e
    return state


def _log(job: Job, averaged: nn.Module, step: int, seconds: float, loss: float) -> None:
    numbers = {k: round(v, 4) for k, v in job.evaluate(averaged).items()}
    at = {"step": step, "of": job.steps, "seconds": round(seconds), "loss": round(loss, 4)}
    _write_log(job, {**at, **numbers})


def _write_log(job: Job, entry: dict[str, Any]) -> None:
    stamped = {"job": job.name, "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"), **entry}
    with job.log.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(stamped) + "\n")


def _environment() -> dict[str, Any]:
    threads = torch.get_num_threads()
    return {"torch": torch.__version__, "python": platform.python_version(), "threads": threads}


class _StopSignal:
    """Remembers that SIGTERM or SIGINT arrived, so that training stops between two steps."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> _StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
