"""Races the contestants of one case: each is a process, one works at a time, in a random order in every round.

What was measured is written after every round, so a run that was stopped goes on where it was. Contestants that do not
all fit into memory race in heats; the baseline takes part in every heat, and ratios are formed within a round.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any, Self

import numpy as np

from benchmarks.peer_cases import BASELINE, CONTESTANTS, REFERENCE, Case, Contestant
from benchmarks.peer_load import MOST_CORES, OtherLoad
from benchmarks.peer_models import PROMPTS, WORKER, environment, loads
from ditc.runtime.atomic import write_atomic
from ditc.runtime.metrics import psnr, relative_l2

GAP_S = 0.1  # threads of one contestant that still spin must not slow the next one
EQUAL_DB = 160.0  # equal pictures count as this
KEPT_FREE_MB = 1500


class WorkerError(Exception):
    """A contestant failed. The message is its own."""


class Worker:
    """The process of one contestant, from its start until `close`.

    Args:
        settings: as peer_worker.py takes them.
        python: the interpreter of its environment.
        log: the file that its libraries print to.
    """

    def __init__(self, python: Path, settings: Mapping[str, Any], log: Path, env: Mapping[str, str]) -> None:
        self._log, self._stderr = log, log.open("w", encoding="utf-8")
        self.started = perf_counter()
        self._process = subprocess.Popen(
            [str(python), "-P", str(WORKER), json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=dict(env),
        )

    @property
    def process_id(self) -> int:
        """The id of the process."""
        return self._process.pid

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            WorkerError: it is an error, or the process has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            code = self._process.wait()
            raise WorkerError(f"ended with {code}: {said[-1] if said else 'nothing was printed'}"[:300])
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"].splitlines()[0][:300])
        return answer

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a command. Raises WorkerError as `answer` does."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(command)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` says why
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Race:
    """One case and what has been measured of it.

    Args:
        case: the case.
        contestants: those that take part.
        cache: the folder of prepared models.
        peer: the Python of optimum-intel's environment, if there is one.
        key: what the measurements depend on: those of another key are dropped.
        fresh: drop all measurements.
        noisy: count rounds during which other programs ran, too.
    """

    def __init__(
        self,
        case: Case,
        contestants: Sequence[Contestant],
        cache: Path,
        peer: Path | None,
        *,
        threads: int,
        key: str,
        fresh: bool = False,
        noisy: bool = False,
    ) -> None:
        self.case, self.contestants = case, {c.name: c for c in contestants}
        self._cache, self._peer, self._threads, self._noisy = cache, peer, threads, noisy
        self._work = cache / case.model.name / "work" / case.name
        self._file = cache / "state" / f"{case.name}.json"
        self.state: dict[str, Any] = {"key": key, "loaded": {}, "failed": {}, "rounds": []}
        if self._file.exists() and not fresh:
            earlier = json.loads(self._file.read_text(encoding="utf-8"))
            if earlier["key"] == key:
                self.state = {**earlier, "failed": {}}
        self._order = random.Random(len(self.state["rounds"]))
        self._prompts = PROMPTS.read_text(encoding="utf-8").splitlines()

    def run(self, rounds: int, seconds: float, at_once: int) -> bool:
        """Race until every contestant has run `rounds` times or the time is over. Returns whether all have.

        Args:
            at_once: how many contestants are loaded together, beside the baseline.
        """
        self._work.mkdir(parents=True, exist_ok=True)
        stop = monotonic() + seconds
        self._answer_reference(rounds, stop)
        while (pending := self._pending(rounds)) and monotonic() < stop:
            others = [name for name in pending if name != BASELINE][:at_once]
            heat = [name for name in (BASELINE, *others) if name in self.contestants]
            before = (len(self.state["rounds"]), len(self.state["failed"]))
            self._heat([name for name in heat if name not in self.state["failed"]], rounds, stop)
            if (len(self.state["rounds"]), len(self.state["failed"])) == before:
                break  # nothing more fits into the time or the memory
        return not self._pending(rounds)

    def done(self, name: str) -> int:
        """How many rounds of the contestant count."""
        rounds = [each["operations"] for each in self.state["rounds"] if each["counts"]]
        return sum(name in next(iter(operations.values()), {}) for operations in rounds)

    def _pending(self, rounds: int) -> list[str]:
        return [n for n in self.contestants if n not in self.state["failed"] and self.done(n) < rounds]

    def _heat(self, names: list[str], rounds: int, stop: float) -> None:
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for name in names:
                if lack := self._lack_of_memory(name):
                    sys.stderr.write(f"{name}: {lack}\n")
                    if not workers.keys() - {BASELINE}:  # it would be the same in the next heat
                        self.state["failed"][name] = lack
                    break
                worker = self._start(name, stack)
                if worker is not None:
                    workers[name] = worker
            longest = 0.0
            racing = [name for name in names if name != BASELINE] or names
            while any(name in workers and self.done(name) < rounds for name in racing):
                begun = monotonic()
                if begun + longest > stop:
                    break
                self._round(workers)
                longest = max(longest, monotonic() - begun)

    def _round(self, workers: dict[str, Worker]) -> None:
        number = len(self.state["rounds"])
        others = OtherLoad(worker.process_id for worker in workers.values())
        record: dict[str, Any] = {"operations": {}, "fidelity": {}}
        for operation in self.case.operations:
            command = self._command(operation, number)
            seconds: dict[str, float] = {}
            for name in self._order.sample(list(workers), len(workers)):
                sleep(GAP_S)
                try:
                    answer = workers[name].ask({**command, "save": str(self._saved(operation, name))})
                except WorkerError as e:
                    self._fail(name, str(e))
                    workers.pop(name).close()
                    continue
                seconds[name] = answer["seconds"]
                self.state["loaded"][name]["peak_mb"] = answer["memory"].get("peak_mb")
            record["operations"][operation] = seconds
        for operation, seconds in record["operations"].items():
            record["fidelity"][operation] = self._fidelity(operation, number, list(seconds))
        cores = others.cores()
        record |= {"other_cores": cores, "counts": self._noisy or (cores or 0.0) <= MOST_CORES}
        self.state["rounds"].append(record)
        self._save()
        note = "" if record["counts"] else f", not counted: other programs used {cores:.2f} cores"
        sys.stderr.write(f"{self.case.name}: round {number + 1}, {len(workers)} contestants{note}\n")

    def _start(self, name: str, stack: ExitStack) -> Worker | None:
        """Load a contestant and warm it up, or note why that is not possible."""
        sys.stderr.write(f"{self.case.name}: loading {name}\n")
        try:
            worker = stack.enter_context(self._worker(self.contestants[name]))
            facts = worker.answer()
            ready = perf_counter()
            for count in range(self.case.warm_up):
                for operation in self.case.operations:
                    worker.ask({**self._command(operation, -1 - count), **self.case.warm_up_changes})
                    if count == 0 and "first_s" not in facts:
                        facts["first_s"] = perf_counter() - ready
                        facts["to_first_result_s"] = perf_counter() - worker.started
        except WorkerError as e:
            self._fail(name, str(e))
            return None
        self.state["loaded"].setdefault(name, {"starts": []})["starts"].append(facts)
        return worker

    def _worker(self, contestant: Contestant) -> Worker:
        pixels = self.case.pixels
        optimum = contestant.kind == "optimum"
        if optimum and self._peer is None:
            raise WorkerError("optimum-intel has no environment here: --make-peer-env DIR makes one")
        settings = {
            **{"kind": contestant.kind, "threads": self._threads, "height": pixels, "width": pixels},
            "model": str(loads(contestant, self.case.model, self._cache)),
            **contestant.settings,
        }
        python = self._peer if optimum and self._peer else Path(sys.executable)
        env = environment(bare=optimum, threads=self._threads, cache=self._cache)
        return Worker(python, settings, self._work / f"{_file_name(contestant.name)}.log", env)

    def _command(self, operation: str, number: int) -> dict[str, Any]:
        """The command of a round. Rounds before 0 warm up, with prompts of their own."""
        command = {**self.case.operations[operation], "latents": str(self._latents(number))}
        if command["do"] != "decode":
            command |= {"height": self.case.pixels, "width": self.case.pixels}
        if "prompt" in command and command["prompt"] is None:
            prompt = self._prompts[-1 - (number + self.case.warm_up) % len(self._prompts)]
            command["prompt"] = prompt + self.case.suffix
        return command

    def _latents(self, number: int) -> Path:
        """Starting noise, which is the same for all contestants. Only pictures need another one in each round."""
        number = self._input(number)
        path = self._work / f"latents-{number}.npy"
        if not path.exists():
            cells = self.case.pixels // self.case.model.pixels_per_cell
            rng = np.random.default_rng(1000 + number)
            shape = (1, self.case.model.latent_channels, cells, cells)
            np.save(path, rng.standard_normal(shape).astype(np.float32))
        return path

    def _answer_reference(self, rounds: int, stop: float) -> None:
        """Let the reference answer the commands of the rounds that are compared, if there is time."""
        compared = min(rounds, rounds if self.case.compared is None else self.case.compared)
        commands = [self._command(o, number) for o in self.case.operations for number in range(compared)]
        missing = {path: c for c in commands if not (path := self._reference(c)).exists()}
        if not missing:
            return
        sys.stderr.write(f"{self.case.name}: {REFERENCE} answers {len(missing)} times\n")
        with self._worker(next(c for c in CONTESTANTS if c.name == REFERENCE)) as worker:
            worker.answer()
            for path, command in missing.items():
                if monotonic() > stop:
                    break
                worker.ask({**command, "save": str(path)})

    def _fidelity(self, operation: str, number: int, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """How far each answer is from the reference's; {} in rounds that are not compared."""
        path = self._reference(self._command(operation, number))
        if not path.exists():
            return {}
        reference, found = np.load(path), {}
        start = np.load(self._latents(number)) if self.case.operations[operation]["do"] == "step" else None
        for name in names:
            result = np.load(self._saved(operation, name))
            if start is not None:  # what the step changed, because the noise that both began with is no merit
                found[name] = {"relative_l2": relative_l2(result - start, reference - start)}
            else:
                decibels = min(psnr(result, reference), EQUAL_DB)
                found[name] = {"psnr_db": decibels, "relative_l2": relative_l2(result, reference)}
        return found

    def _saved(self, operation: str, name: str) -> Path:
        return self._work / f"{_file_name(f'{operation} {name}')}.npy"

    def _reference(self, command: Mapping[str, Any]) -> Path:
        """Where the reference's answer to the command lies."""
        said = {**command, "latents": Path(command["latents"]).name}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        return self._work / f"reference-{digest[:16]}.npy"

    def _input(self, number: int) -> int:
        """The round whose inputs this round takes. Only pictures need others in each round."""
        return number if any(command["do"] == "draw" for command in self.case.operations.values()) else 0

    def _fail(self, name: str, why: str) -> None:
        sys.stderr.write(f"{name}: {why}\n")
        self.state["failed"][name] = why
        self._save()

    def _save(self) -> None:
        write_atomic(self._file, json.dumps(self.state), durable=False)

    def _lack_of_memory(self, name: str) -> str:
        """Why the contestant is not loaded now; "" if there is room: for its files twice, as some make a copy."""
        folder = loads(self.contestants[name], self.case.model, self._cache)
        settings = self.contestants[name].settings
        files = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin", ".data")]
        if settings.get("precision"):  # a bundle has the files of all precisions
            files = [p for p in files if settings["precision"] in p.name]
        needed = 2 * sum(p.stat().st_size for p in files) / 2**20 + 500
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) / 1024 - KEPT_FREE_MB
        return f"needs {needed:.0f} MB, and {free:.0f} MB are free" if needed > free else ""


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)
