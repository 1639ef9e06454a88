"""How many replicas does a load need? Replays arrivals against measured times, with the server's own policy.

    python -m benchmarks.capacity measure --bundle BUNDLE       times of one server's parts, into capacity-times.json
    python -m benchmarks.capacity simulate --load 0.7           p50, p99, rejections and cost for 1 to 1,000 replicas
    python -m benchmarks.capacity simulate --rate 20 --trace bursts --replicas 2 3 4
    python -m benchmarks.capacity check --bundle BUNDLE         predictions beside real servers, for 1 and 2 replicas

A replica of the simulation is the server's real queue, admission, policy and step times (runtime/serving/scheduling)
on a virtual clock. Only the work itself is replaced: it takes a time that is drawn from the measured ones. A balancer
gives every request to the replica with the fewest open requests.

`measure` and `check` start `ditc serve` processes with one thread each on the loopback interface. `check` replays one
trace against them and in the simulation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.capacity_servers import measured, replayed, servers
from benchmarks.capacity_simulation import MIX, Times, arrivals, simulate
from benchmarks.machine import write
from ditc.runtime.atomic import write_atomic

TIMES = Path("build/capacity-times.json")
REPLICAS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def check(bundle: Path, load: float, seconds: float) -> dict[str, Any]:
    """Predictions beside real runs, for 1 and 2 replicas.

    "forecast" knows only times from before the run, so its error is also that of a machine whose speed changes.
    "model" knows how long the parts of each request took in the run, and predicts what waiting makes of that.
    """
    found: dict[str, Any] = {"load": load, "seconds": seconds, "mix": MIX}
    for count in (1, 2):
        with servers(bundle, count) as addresses:
            before = measured(addresses)
            trace = arrivals("poisson", load * count / before.mean_service(), seconds, seed=count)
            real, timed = replayed(trace, addresses)
        row: dict[str, Any] = {"real": real, "mean_service_before_s": round(before.mean_service(), 4)}
        for name, arrived in (("forecast", trace), ("model", timed)):
            row[name] = simulate(arrived, before, count)
            for quantile in ("p50", "p99"):
                error = row[name][f"{quantile}_s"] / real[f"{quantile}_s"] - 1
                row[name][f"{quantile}_error"] = round(error, 3)
        found[f"{count} replicas"] = row
        print(json.dumps(found[f"{count} replicas"]), file=sys.stderr)
    return found


def table(times: Times, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of replicas."""
    rows = []
    for replicas in arguments.replicas:
        rate = arguments.rate or arguments.load * replicas / times.mean_service()
        seconds = min(arguments.seconds, arguments.most_requests / rate)
        trace = arrivals(arguments.trace, rate, seconds, arguments.seed)
        row: dict[str, Any] = {
            "replicas": replicas,
            "rate": round(rate, 2),
            **simulate(trace, times, replicas),
        }
        served = row["pictures_per_s"] * 3600
        row["cost_per_1000"] = round(1000 * replicas * arguments.price / served, 4) if served else math.nan
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return rows


def main() -> None:
    """Run one of the three verbs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    busy = "Share of the replicas' time that the requests need."
    for name in ("measure", "check"):
        verbs.add_parser(name).add_argument("--bundle", type=Path, default=Path("build/demo/bundle"))
    verbs.choices["check"].add_argument("--load", type=float, default=0.6, help=busy)
    verbs.choices["check"].add_argument("--seconds", type=float, default=60.0)
    sim = verbs.add_parser("simulate")
    sim.add_argument("--times", type=Path, default=TIMES)
    sim.add_argument("--trace", choices=["poisson", "bursts", "diurnal"], default="poisson")
    sim.add_argument("--rate", type=float, help="Requests per second (default: by --load, for each row).")
    sim.add_argument("--load", type=float, default=0.7, help=busy)
    sim.add_argument("--seconds", type=float, default=600.0)
    sim.add_argument(
        "--most-requests", type=int, default=20_000, help="Ends the trace after so many requests."
    )
    sim.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    sim.add_argument(
        "--price", type=float, default=1.0, help="Price of an hour of one replica, in any currency."
    )
    sim.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.verb == "measure":
        with servers(arguments.bundle, 1) as addresses:
            print(write_atomic(TIMES, json.dumps(asdict(measured(addresses)))))
    elif arguments.verb == "check":
        print(write("capacity_check", check(arguments.bundle, arguments.load, arguments.seconds)))
    else:
        times = Times(**json.loads(arguments.times.read_bytes()))
        print(write(f"capacity_{arguments.trace}", {"times": asdict(times), "rows": table(times, arguments)}))


if __name__ == "__main__":
    main()
