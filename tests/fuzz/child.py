"""A process that tries picks of one group, under a limit of memory, and writes one line of JSON about each of them.

    python -m fuzz.child GROUP FOLDER SUBJECTS PICK...

FOLDER/work is the working directory, in which a pick may do what it was asked to do. Everything else in FOLDER is the
canary, home included but not temporary files, and must be the same before and after. What a pick prints goes to
FOLDER/printed. A pick that kills the process, or that does not end, is seen by the parent (picks.py).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

MEMORY_BYTES = 2 * 2**30
FILE_BYTES = 2**28
# What of mutate.TEXTS no terminal may receive; ONNX Runtime colours its own errors.
TERMINAL = ("\x1b]", "\u202e", "\x07")
# Groups that print only through the command line.
PRINT = ("Manifests", "Certificates", "GoldenFiles", "CommandLines")
NOT_CANARY = {"work", "printed", "temporary"}


class WrongResult(AssertionError):
    """A pick has ended well, but what it has done is not what was asked."""


class Group(Protocol):
    """A kind of input, with files that it may damage."""

    def attempt(self, chooser: random.Random, work: Path) -> str:
        """Damage something, use it, and say in a word how that ended.

        Raises:
            DitcError: it was refused.
            WrongResult: it was used, and the result is wrong.
        """


def prepare_canary(folder: Path) -> None:
    """Lay out what nobody may touch."""
    canary = folder / "canary"
    (canary / "empty").mkdir(parents=True)
    (canary / "letter.txt").write_text("only for the eyes of its owner")
    (canary / "weights.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (canary / "link").symlink_to("letter.txt")
    for name in ("home", "temporary"):
        (folder / name).mkdir()


def everything(folder: Path, without: set[str]) -> dict[str, str]:
    """What is in a folder: names, kinds, times and contents."""

    def entries(inside: Path, top: bool) -> Iterator[Path]:
        for path in sorted(inside.iterdir()):
            if top and path.name in without:
                continue
            yield path
            if path.is_dir() and not path.is_symlink():
                yield from entries(path, False)

    found = {}
    for path in entries(folder, True):
        state = path.lstat()
        content = (
            "" if path.is_symlink() or not path.is_file() else hashlib.sha256(path.read_bytes()).hexdigest()
        )
        found[str(path.relative_to(folder))] = f"{state.st_mode} {content}"
    return found


def main(group: str, folder: Path, subjects: dict[str, str], picks: list[int]) -> None:
    """Try the picks."""
    from ditc.runtime.errors import DitcError

    report = os.fdopen(os.dup(1), "w")
    printed = os.open(folder / "printed", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)

    def tell(**facts: object) -> None:
        report.write(json.dumps(facts) + "\n")
        report.flush()

    work = folder / "work"
    module, _, name = group.rpartition(".")
    made: Group = getattr(importlib.import_module(f"fuzz.{module}"), name)(
        {key: Path(path) for key, path in subjects.items()}, folder
    )
    limit_memory()
    tell(ready=True)
    for pick in picks:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        os.chdir(work)
        os.ftruncate(printed, 0)
        before = everything(folder, NOT_CANARY)
        tell(begin=pick)
        verdict = fault = ""
        try:
            verdict = made.attempt(random.Random(f"{group} {pick}"), work)
        except DitcError as error:
            verdict = "refused"
            if not error.hint:
                fault = f"no hint: {type(error).__name__}: {error!s:.300}"
        except WrongResult as error:
            fault = f"wrong result: {error!s:.600}"
        except BaseException:  # whatever escapes is what is looked for
            fault = traceback.format_exc()[-3000:]
        os.chdir(folder)
        sys.stdout.flush()
        sys.stderr.flush()
        text = os.pread(printed, 2**20, 0).decode(errors="replace")
        if not fault and "Traceback (most recent call last)" in text:
            fault = text[-3000:]
        if not fault and name in PRINT and any(sign in text for sign in TERMINAL):
            fault = f"controls the terminal: {text!r:.2000}"
        after = everything(folder, NOT_CANARY)
        if before != after:
            changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
            fault += f"\nchanged outside the working folder: {changed[:5]}"
        tell(end=pick, verdict=verdict, fault=fault)
    os._exit(0)  # the libraries take seconds to close


def limit_memory() -> None:
    """Allow this much more address space than is in use, and no huge files or core dumps."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), [int(pick) for pick in sys.argv[4:]])
