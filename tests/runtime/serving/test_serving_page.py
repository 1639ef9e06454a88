"""docs/serving.md: its examples run, and its tables name what the code has."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from serving_process import ServerProcess, server_process

from ditc.runtime.commands.serve import add_arguments
from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.metrics import Metrics
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission
from ditc.runtime.serving.settings import Bounds

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(sh|python)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SERVING = ROOT / "runtime" / "serving"


def section(title: str) -> str:
    return TEXT[TEXT.index(f"\n## {title}\n") :].split("\n## ", 2)[1]


def first_cells(title: str) -> list[str]:
    """The names in the first two cells of a section's table, without quotes."""
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|", section(title), re.MULTILINE)
    return re.findall(r"`([^`]+)`", "\n".join(cell for row in rows for cell in row))


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, video_bundle: Path) -> Iterator[ServerProcess]:
    named = ("--name", f"demo={tiny_bundle}", "--name", f"clips={video_bundle}")
    with server_process(*named, "--no-self-test") as server:
        yield server


@pytest.mark.parametrize(("kind", "code"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(server: ServerProcess, kind: str, code: str, tmp_path: Path) -> None:
    code = code.replace("http://127.0.0.1:8000", server.url)
    for name in ("first.png", "photo.png"):
        Image.new("RGB", (64, 32), "red").save(tmp_path / name)
    command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_size > 100 for file in tmp_path.iterdir())


def test_every_client_has_an_example() -> None:
    code = "\n".join(code for _, code in EXAMPLES)
    assert all(
        word in code
        for word in ("curl", "from openai", "from huggingface_hub", "stream=True", "client.videos")
    )


def options() -> dict[str, argparse.Action]:
    """The options of `ditc serve` that `ditc run` does not have too, by name."""
    from ditc.runtime.load_options import add_load_arguments

    found, loading = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_arguments(found)
    add_load_arguments(loading)
    shared = {name for action in loading._actions for name in action.option_strings}
    own = [action for action in found._actions if not shared.intersection(action.option_strings)]
    return {action.option_strings[-1]: action for action in own if action.option_strings}


def test_every_option_is_explained() -> None:
    text = TEXT + (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in options() if f"`{name}" not in text] == []


def test_every_limit_is_listed_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(--[\w-]+)` \| (\S+) \|", section("Limits"), re.MULTILINE))
    limits = {
        name: str(action.default)
        for name, action in options().items()
        if name.startswith("--max") or name.endswith(("-timeout", "--keep-seconds"))
    }
    limits.pop("--max-batch")  # says how to draw, and refuses nothing
    limits.pop("--max-replicas")
    limits.pop("--max-loras")  # bounds what is kept in memory, and refuses nothing
    assert listed == limits


def test_every_metric_is_listed_and_exists() -> None:
    metrics = Metrics()
    metrics.watch(Models({}, admission=Admission(Bounds()), awaited=()))
    text = (SERVING / "metrics.py").read_text(encoding="utf-8")
    counters = set(re.findall(r'(?:Counter\(|CounterMetricFamily\(\s*)\s*"(ditc_\w+)"', text))
    names = {f"{name}_total" if name in counters else name for name in re.findall(r'"(ditc_\w+)"', text)}
    listed = {name.split("{")[0] for name in first_cells("Metrics") if name.startswith("ditc_")}
    assert listed - {"ditc_process_*"} == names
    scraped = metrics.text().decode()
    assert all(name in scraped for name in ("ditc_process_", "python_info"))


def error_codes() -> set[str]:
    """Every code that the server's modules give to an error."""
    found = set()
    for path in SERVING.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                found.add(node.value.value)
            if isinstance(node, ast.Assign) and "code" in ast.unparse(node.targets[0]):
                found |= set(re.findall(r"'([a-z_]+)'", ast.unparse(node.value)))
    framework = ast.unparse(ast.parse((SERVING / "http" / "errors.py").read_text(encoding="utf-8")))
    return found | set(re.findall(r"\d{3}: \('(\w+)'", framework))


def test_every_error_is_listed_and_exists() -> None:
    listed = {name for name in first_cells("Answers that are no picture") if re.fullmatch("[a-z_]+", name)}
    assert listed == error_codes() - {"missing", "extra_forbidden", "json_invalid", "refused"}


def test_every_path_is_listed_and_exists(tiny_bundle: Path) -> None:
    app = create_app(Models({"tiny": tiny_bundle}, admission=Admission(Bounds())))
    paths = {
        f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods
    }
    listed = {name for name in first_cells("Examples") if " /" in name}
    assert listed - {"GET /ui/", "GET /openapi.json"} == paths


def test_every_command_of_the_server_parses() -> None:
    lines = re.findall(r"^    ditc serve (.*?)(?:\s+#.*)?$", TEXT, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_arguments(parser)
        parser.parse_args(shlex.split(line))
