"""A path for safetensors' save_file, whose file appears complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ditc.runtime.atomic import HINT, atomic_path


@contextmanager
def safetensors_path(path: Path, *, durable: bool = True, hint: str = HINT) -> Iterator[Path]:
    """`atomic_path` for save_file, which raises an error of its own where the disk is full or read-only.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_path(path, durable=durable, hint=hint) as partial:
        try:
            yield partial
        except SafetensorError as e:
            raise OSError(str(e)) from e
