"""Tries picks of a group in a child process, and starts another one where a pick has killed it or does not end."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from fuzz.child import prepare_canary

ROOT = Path(__file__).parents[2]
# A pick takes less than a second. Other work on the same machine must not fail it.
TIMEOUT_S = 120.0
START_TIMEOUT_S = 300.0
# Libraries keep some memory of every pick, so a process does not try all of them.
PICKS_PER_PROCESS = 250


@dataclass
class Found:
    """What the picks of one group have shown.

    Attributes:
        verdicts: how often picks ended in which way.
        faults: what went wrong, by pick.
    """

    group: str
    seconds: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.group}: {self.verdicts.total()} picks in {self.seconds:.0f} s, {dict(self.verdicts)}"
        ]
        for pick, fault in self.faults.items():
            again = f"FUZZ_PICK={pick} python -m pytest tests/fuzz -k {self.group}"
            lines.append(f"--- pick {pick}; again: {again}\n{fault}")
        return "\n".join(lines)


def check_picks(group: str, count: int, subjects: Mapping[str, Path], folder: Path) -> str:
    """Try the first `count` picks of a group, or those that the variable FUZZ_PICK names, and say what they showed.

    Raises:
        AssertionError: something is wrong. The message says what, and how to try the same picks again.
    """
    named = os.environ.get("FUZZ_PICK")
    picks = [int(pick) for pick in named.split(",")] if named else range(count)
    found = try_picks(group, picks, subjects, folder)
    assert not found.faults, str(found)
    return str(found)


def try_picks(group: str, picks: Sequence[int], subjects: Mapping[str, Path], folder: Path) -> Found:
    """Try the picks one after the other."""
    found, started = Found(group), perf_counter()
    left = list(picks)
    while left:
        place = Path(tempfile.mkdtemp(dir=folder))
        prepare_canary(place)
        done = _one_process(group, left[:PICKS_PER_PROCESS], subjects, place, found)
        left = left[done:]
    found.seconds = perf_counter() - started
    return found


def _one_process(
    group: str, picks: Sequence[int], subjects: Mapping[str, Path], place: Path, found: Found
) -> int:
    """Try picks until one kills the process, and return how many were tried."""
    names = {key: str(path) for key, path in subjects.items()}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "temporary"),
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "fuzz.child", group, str(place), json.dumps(names), *map(str, picks)]
    printed = place / "printed"
    with (
        printed.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=place) as child,
    ):
        lines = _Lines(child)
        done, begun = 0, None
        wait = START_TIMEOUT_S
        late = False
        try:
            while (line := lines.next(wait)) is not None:
                facts = json.loads(line)
                wait = TIMEOUT_S
                begun = facts.get("begin")
                if "end" in facts:
                    done += 1
                    found.verdicts["fault" if facts["fault"] else facts["verdict"]] += 1
                    if facts["fault"]:
                        found.faults[facts["end"]] = facts["fault"]
        except TimeoutError:
            late = True
            child.kill()
        code = child.wait()
    if done == len(picks):
        return done
    text = printed.read_bytes()[-3000:].decode(errors="replace")
    assert begun is not None, f"the process of {group} did not begin: {text}"
    found.verdicts["fault"] += 1
    what = f"no end within {TIMEOUT_S:.0f} s" if late else f"the process ended with {code}"
    found.faults[begun] = f"{what}\n{text}"
    return done + 1


class _Lines:
    """The lines that a process writes, each waited for only so long."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        self._child, self._buffer = child, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(child.stdout, selectors.EVENT_READ)

    def next(self, timeout_s: float) -> bytes | None:
        """The next line; None if the process has ended. Raises TimeoutError if it does not come in time."""
        assert self._child.stdout is not None
        while b"\n" not in self._buffer:
            if not self._selector.select(timeout_s):
                raise TimeoutError
            part = os.read(self._child.stdout.fileno(), 2**16)
            if not part:
                return None
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line
