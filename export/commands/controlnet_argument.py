"""The option --controlnet of the verbs that open a checkpoint (export/checkpoint/controlnet.py reads the folder)."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_controlnet_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option --controlnet. `what` is a sentence that says what is done with the folder."""
    parser.add_argument(
        "--controlnet",
        type=Path,
        metavar="DIR",
        help=f"{what} The folder holds the config.json and the weights of a ControlNet for this checkpoint (default: "
        "the checkpoint's own, if it has one).",
    )
