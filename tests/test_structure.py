"""docs/structure.md answers "where do I change X?" with files that exist, and names every file that a change needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
# Changes that a newcomer asks about, and the files that each change needs.
NEEDED = {
    "a new model family": {
        "export/families/__init__.py",
        "tests/tiny_sana.py",
        *("adapter.py", "config.py", "keys.py", "network.py", "recipe.py"),
    },
    "a few-step sampler": {
        "runtime/schedulers/__init__.py",
        "runtime/schedulers/params.py",
        "runtime/schedulers/spacing.py",
        "runtime/step_contract.py",
        "export/checkpoint/scheduler_config.py",
        "tests/runtime/test_samplers.py",
    },
    "a new backend": {
        "runtime/session.py",
        "runtime/sessions/registry.py",
        "tests/runtime/sessions/test_registry.py",
    },
    "a new graph pass": {"export/graph/passes/__init__.py", "tests/export/graph/passes/test_passes.py"},
    "a new verb": {"runtime/cli.py", "docs/cli.md", "docs/cli_reference.py"},
    "an HTTP endpoint": {
        "runtime/serving/api/hugging_face.py",
        "runtime/serving/api/routes.py",
        "runtime/serving/api/schemas.py",
    },
    "LoRA": {
        "runtime/weight_map.py",
        "export/build/weights.py",
        "export/checkpoint/tensors.py",
        "export/networks/loading.py",
    },
    "video": {
        "runtime/step_contract.py",
        "runtime/rng.py",
        "runtime/sizes.py",
        "runtime/prepare.py",
        "runtime/decode.py",
        "runtime/vae.py",
        "runtime/video.py",
        "runtime/video_files.py",
        "export/families/sana/video_plan.py",
        "export/families/common/video_vae.py",
        "export/graph/step.py",
    },
}


def answer(question: str) -> str:
    """The second cell of the row that begins with the question."""
    row = re.search(rf"^\| {re.escape(question)} \| (.*) \|$", TEXT, re.MULTILINE)
    assert row, f"docs/structure.md has no row for {question}"
    return row[1]


@pytest.mark.parametrize("question", NEEDED)
def test_the_answer_names_every_file_that_the_change_needs(question: str) -> None:
    named = set(re.findall(r"`([\w/.-]+)`", answer(question)))
    assert not NEEDED[question] - named


@pytest.mark.parametrize("question", NEEDED)
def test_every_file_of_an_answer_exists(question: str) -> None:
    paths = {name for name in re.findall(r"`([\w/.-]+)`", answer(question)) if "/" in name}
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_that_a_table_lists_is_where_the_table_says() -> None:
    """A module that the table names without a folder lies in its part, or beside the module named before it."""
    for part in ("runtime", "export"):
        section = TEXT[TEXT.index(f"## {part}/:") :].split("\n## ", 1)[0]
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
            folder = ROOT / part
            for name in re.findall(r"`([\w/.-]+)`", row):
                path = ROOT / part / name if "/" in name or (ROOT / part / name).exists() else folder / name
                assert path.exists(), f"{part}: {name}"
                folder = path.parent


def test_no_module_of_the_runtime_is_left_out() -> None:
    section = TEXT[TEXT.index("## runtime/:") :].split("\n## ", 1)[0]
    for path in (ROOT / "runtime").rglob("*.py"):
        folder = path.parent.name
        covered = f"`{folder}/`" in section  # a folder that one row describes as a whole
        assert covered or path.name == "__init__.py" or path.name.removesuffix(".py") in section, path
