"""README and docs: every command parses, every make target exists, and every link leads to a file."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ditc.runtime.cli import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
COMMAND = re.compile(r"^(?: {4,}|\$ )(ditc [a-z]+(?: .*?)?)(?:\s+#.*)?$", re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The commands that a reader would type. A line that ends in a backslash continues on the next one."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    return [line for line in COMMAND.findall(text) if line.split()[1] in VERBS or " -> " not in line]


def targets() -> dict[str, str]:
    """The documented targets of the Makefile, each with its line of help."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"^([a-z-]+):.*?##\s*(.+)$", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_ditc_line_parses(page: Path) -> None:
    for line in commands(page):
        _, verb, *arguments = shlex.split(line.split(" -> ")[0])
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("-v", action="count")
        importlib.import_module(VERBS[verb].module).add_arguments(parser)
        assert parser.parse_known_args(arguments)[1] == [], line


def test_the_readme_has_commands_to_parse() -> None:
    lines = commands(PAGES[0])
    assert {line.split()[1] for line in lines} >= {"build", "run", "inspect", "verify", "doctor"}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets().keys()


def test_the_readme_names_demo_test_and_check() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert all(f"make {target}" in text for target in ("demo", "test", "check"))
    assert {"demo", "test", "check"} <= targets().keys()


def test_make_alone_lists_every_target() -> None:
    out = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert set(phony[1].split()) - listed <= {"types"}
    assert all(option in out for option in ("MODEL=", "OUT=", "BACKEND=", "PRECISION=", "PROMPT="))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_source_file_that_is_named_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:runtime|export|parity|calib|tests|demo|docs)/[\w/.-]*)`", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_command_reference_matches_the_code() -> None:
    path = ROOT / "docs" / "cli_reference.py"
    spec = importlib.util.spec_from_file_location("cli_reference", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == module.reference(), "run: python docs/cli_reference.py > docs/cli.md"


def test_structure_lists_every_module_of_the_runtime() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "runtime").glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f"`{name}`" not in text} == set()
