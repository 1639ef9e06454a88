"""``python -m demo.join FOLDER``: make the complete checkpoint of the distilled demo model.

``demo/sprint/`` holds only what differs from the demo checkpoint. The text encoder, the tokenizer and the autoencoder
are the demo checkpoint's, and are copied from it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from demo.concepts import CHECKPOINT_DIR, SPRINT_DIR
from demo.errors import DemoError, explained
from ditc.runtime.atomic import atomic_folder

SHARED = ("text_encoder", "tokenizer", "vae")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and join the parts."""
    parser = argparse.ArgumentParser(prog="python -m demo.join", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the checkpoint; an older one is replaced")
    arguments = parser.parse_args(argv)
    try:
        join(arguments.folder)
    except DemoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def join(folder: Path, sprint: Path = SPRINT_DIR, checkpoint: Path = CHECKPOINT_DIR) -> None:
    """Write a checkpoint that ``SanaSprintPipeline.from_pretrained`` loads.

    Raises:
        DemoError: the folder holds something that is not a checkpoint, or cannot be written.
    """
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise DemoError(f"{folder} exists and is not a checkpoint.", "choose another folder, or remove it.")
    with explained(), atomic_folder(folder, replace=True) as partial:
        shutil.copytree(sprint, partial, dirs_exist_ok=True)
        for name in SHARED:
            shutil.copytree(checkpoint / name, partial / name)


if __name__ == "__main__":
    sys.exit(main())
