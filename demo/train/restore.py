"""Turn the shipped weights into training states, so that training can continue from them with fresh optimizers."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import SanaPipeline

from demo.concepts import CHECKPOINT_DIR
from demo.errors import DemoError
from demo.train import autoencoder, text, transformer
from demo.train.loop import save_fresh_state


def run(cache: Path, checkpoint: Path = CHECKPOINT_DIR) -> None:
    """Fill an empty cache with the checkpoint's tokenizer, and with each part as a state at step 0.

    Raises:
        DemoError: the cache already holds training states, which must not be overwritten.
    """
    names = (text.NAME, autoencoder.NAME, transformer.NAME)
    if found := [n for n in names if (cache / f"{n}.pt").exists()]:
        raise DemoError(
            f"{cache} already holds {found[0]}.pt.", "continue training from it, or pass another --cache."
        )
    pipeline = SanaPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    shutil.copytree(checkpoint / "tokenizer", cache / "tokenizer", dirs_exist_ok=True)
    # The projection onto the teacher's embeddings is not shipped, so it starts from random weights.
    save_fresh_state(cache, text.NAME, text.Student(pipeline.text_encoder))
    save_fresh_state(cache, autoencoder.NAME, pipeline.vae)
    save_fresh_state(cache, transformer.NAME, pipeline.transformer)
