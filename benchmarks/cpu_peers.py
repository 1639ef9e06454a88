"""How fast is ditc on this CPU beside what a user would pick instead, and how true are the results?

    python -m benchmarks.cpu_peers --make-peer-env DIR              once: optimum-intel's own environment
    python -m benchmarks.cpu_peers --peer-python DIR/bin/python     prepare and run all cases
    python -m benchmarks.cpu_peers --prepare --case demo            only make what a case loads
    python -m benchmarks.cpu_peers --case step-0.6b-512             run one case, or go on with it

The contestants are diffusers (eager and torch.compile), optimum-intel, and ditc's backends (peer_cases.py). Each is a
process of its own that loads the same checkpoint once and then answers; one works at a time, in a random order in every
round. A round during which other programs use the CPU is not counted. Each answer is compared with that of diffusers
in fp32. Without optimum-intel's environment, its rows say so.

A case goes on where it was stopped; --fresh begins again. What is prepared and measured lies in --cache. Every run
writes benchmarks/results/cpu_peers-DATE.json, with all cases that this code has measured with these options.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import peer_models
from benchmarks.machine import write
from benchmarks.peer_cases import BASELINE, CONTESTANTS, REFERENCE, Case, Contestant, cases
from benchmarks.peer_race import Race
from benchmarks.peer_report import summary, table
from ditc.runtime.cpu_features import cpu_features
from ditc.runtime.machine import this_machine

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "cpu_peers"


def main() -> None:
    """Prepare, race, print tables and write the results."""
    arguments = parse()
    if arguments.make_peer_env is not None:
        arguments.peer_python = peer_models.make_environment(arguments.make_peer_env.absolute())
        print(arguments.peer_python)
        if not (arguments.case or arguments.prepare):
            return
    # Not resolved: the link is how Python knows its environment.
    peer = arguments.peer_python and arguments.peer_python.absolute()
    table_of_cases = cases(arguments.layers, arguments.text_layers)
    for name in arguments.case or table_of_cases:
        case = table_of_cases[name]
        chosen = contestants(case, arguments.only)
        unprepared = peer_models.prepare(case.model, chosen, arguments.cache, peer)
        if arguments.prepare:
            for contestant, why in unprepared.items():
                print(f"{name}: {contestant}: {why}")
            continue
        race = open_race(case, chosen, arguments, peer)
        race.state["failed"].update(unprepared)
        finished = race.run(arguments.rounds, arguments.seconds, arguments.at_once)
        print(table(case.title, summary(race.state)))
        if not finished:
            print(f"{name} is not finished: run the same command again to go on")
    if not arguments.prepare:
        print(write("cpu_peers", results(table_of_cases, arguments)))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tuple(cases(4, 2))
    parser.add_argument("--case", nargs="+", choices=names, help="Cases to run (default: all).")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="Contestants whose name contains a TEXT.")
    parser.add_argument(
        "--prepare", action="store_true", help="Make what the cases load, and measure nothing."
    )
    parser.add_argument("--fresh", action="store_true", help="Drop what was measured of these cases.")
    parser.add_argument(
        "--noisy", action="store_true", help="Count rounds during which other programs ran, too."
    )
    parser.add_argument("--peer-python", type=Path, help="Python of optimum-intel's environment.")
    parser.add_argument("--make-peer-env", type=Path, metavar="DIR", help="Make that environment in DIR.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: build/cpu_peers")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1800,
        help="Begin no round of a case after this (default: %(default)s).",
    )
    parser.add_argument(
        "--at-once", type=int, default=16, help="Contestants in memory at a time (default: %(default)s)."
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="Threads of every contestant (default: %(default)s).",
    )
    parser.add_argument(
        "--layers", type=int, default=4, help="Layers where one step is timed (default: %(default)s)."
    )
    parser.add_argument(
        "--text-layers",
        type=int,
        default=2,
        help="Layers of the random text encoder in Gemma-2-2b's width, which has 26 (default: %(default)s).",
    )
    return parser.parse_args()


def contestants(case: Case, only: list[str] | None) -> list[Contestant]:
    """Those of the case, in the order of the table. `only` keeps the baseline, to which all are compared."""
    named = [c for c in CONTESTANTS if c.name in case.contestants]
    return [c for c in named if only is None or c.name == BASELINE or any(text in c.name for text in only)]


def open_race(case: Case, chosen: list[Contestant], arguments: argparse.Namespace, peer: Path | None) -> Race:
    """The race of a case, with what was measured of it before."""
    return Race(
        case,
        chosen,
        arguments.cache,
        peer,
        threads=arguments.threads,
        key=state_key(arguments),
        fresh=arguments.fresh,
        noisy=arguments.noisy,
    )


def state_key(arguments: argparse.Namespace) -> str:
    """What measurements must share to stand in one table: ditc's code, the options and the machine."""
    sources = [path for part in ("runtime", "export") for path in (ROOT / part).rglob("*.py")]
    sources += [ROOT / "benchmarks" / f"peer_{part}.py" for part in ("worker", "race", "cases")]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    options = (arguments.layers, arguments.text_layers, arguments.threads, str(this_machine()))
    digest.update(json.dumps(options).encode())
    return digest.hexdigest()


def results(table_of_cases: dict[str, Case], arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured with this code and these options, by case."""
    found = {}
    for name, case in table_of_cases.items():
        race = open_race(case, [], argparse.Namespace(**{**vars(arguments), "fresh": False}), None)
        if race.state["rounds"]:
            found[name] = {"title": case.title, "warm_up": case.warm_up, **summary(race.state)}
    return {
        "threads": arguments.threads,
        "cpu_features": cpu_features(),
        "load": os.getloadavg(),
        "layers": arguments.layers,
        "text_layers": arguments.text_layers,
        "reference": REFERENCE,
        "baseline": BASELINE,
        "cases": found,
    }


if __name__ == "__main__":
    sys.exit(main())
