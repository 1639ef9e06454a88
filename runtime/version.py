"""The version of ditc, which is written once, in pyproject.toml."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed_version(root: Path = Path(__file__).parents[1]) -> str:
    """What the package was installed as; in a source tree that was not installed, what its pyproject.toml says."""
    try:
        return version("ditc")
    except PackageNotFoundError:
        pyproject = root / "pyproject.toml"
        if not pyproject.is_file():
            return "unknown"  # a copied folder, with no record of where it came from
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])


__version__ = installed_version()
