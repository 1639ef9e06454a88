"""The environment of a process that builds engines with ditc's plugin, for which TensorRT-RTX's wheel lacks a link."""

from __future__ import annotations

import os
from pathlib import Path

from ditc.runtime.gpu import RTX_LIBRARY, rtx_library_folder


def environment_with_link(folder: Path) -> dict[str, str]:
    """Make the link in `folder`. The library reads LD_LIBRARY_PATH when its process starts: the build needs its own."""
    library = rtx_library_folder()
    assert library is not None
    (folder / RTX_LIBRARY).symlink_to(library / f"{RTX_LIBRARY}.1")
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}
