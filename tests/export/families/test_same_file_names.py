"""A family is one folder, and all families have the same files in their folders."""

from __future__ import annotations

from pathlib import Path

import pytest

FAMILIES = Path(__file__).parents[3] / "export" / "families"
# The files that a family must have. It may have others too.
NAMES = {"__init__.py", "adapter.py", "config.py", "keys.py", "network.py", "pipeline.py", "recipe.py"}


def folders() -> list[Path]:
    return sorted(
        path for path in FAMILIES.iterdir() if path.is_dir() and path.name not in ("common", "__pycache__")
    )


@pytest.mark.parametrize("folder", folders(), ids=lambda path: path.name)
def test_a_family_has_the_files_that_every_family_has(folder: Path) -> None:
    assert not NAMES - {path.name for path in folder.iterdir()}


def test_the_only_module_beside_the_family_folders_is_the_table() -> None:
    assert [path.name for path in FAMILIES.glob("*.py")] == ["__init__.py"]
