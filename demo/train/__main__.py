"""``python -m demo.train [all|STEP]``: run all steps of the training recipe, or one of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from demo.errors import DemoError

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / "build" / "demo-train"
LOG = REPOSITORY / "demo" / "training_log.jsonl"


def main() -> int:
    """Parse the arguments, run the steps, and turn an expected failure into one line."""
    from demo.train.loop import Stopped
    from demo.train.recipe import OTHER, STEPS, TRAINING, run_step

    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("step", nargs="?", default="all", choices=["all", *TRAINING, *OTHER])
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="art and training states (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, default=LOG, help="file to append the run's log to")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.cache.mkdir(parents=True, exist_ok=True)
    try:
        for step in STEPS if args.step == "all" else [args.step]:
            run_step(step, args.cache, args.log, args.steps)
    except DemoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"error: {e}. hint: check the free space and the permissions of {args.cache}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume.", file=sys.stderr)
        return 130
    except Stopped as e:
        print(e, file=sys.stderr)
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
