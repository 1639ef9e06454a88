"""The version of ditc, which is written once, in pyproject.toml."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed_version(root: Path = Path(__file__).parents[1]) -> str:
    """The version of the installed package, or that of pyproject.toml in a source tree that is not installed."""
    try:
        return version("ditc")
    except PackageNotFoundError:
        pyproject = root / "pyproject.toml"
        if not pyproject.is_file():
            return "unknown"  # a copied folder without its pyproject.toml
        return str(tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"])


__version__ = installed_version()
