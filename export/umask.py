"""The mode that the user's umask gives to new files: safetensors (since 0.6) and mkdtemp make theirs private."""

from __future__ import annotations

import os
from pathlib import Path


def apply_umask(path: Path) -> None:
    """Let a file or directory be read by whom the umask lets."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
