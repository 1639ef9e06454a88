"""A family is one folder, and every family has the same files in it."""

from __future__ import annotations

from pathlib import Path

import pytest

FAMILIES = Path(__file__).parents[3] / "export" / "families"
# What a family must have; further files of its own are welcome.
NAMES = {"__init__.py", "adapter.py", "config.py", "keys.py", "network.py", "recipe.py"}


def folders() -> list[Path]:
    return sorted(
        path for path in FAMILIES.iterdir() if path.is_dir() and path.name not in ("common", "__pycache__")
    )


@pytest.mark.parametrize("folder", folders(), ids=lambda path: path.name)
def test_a_family_has_the_files_that_every_family_has(folder: Path) -> None:
    assert not NAMES - {path.name for path in folder.iterdir()}


def test_nothing_but_the_table_lies_beside_the_families() -> None:
    assert [path.name for path in FAMILIES.glob("*.py")] == ["__init__.py"]
