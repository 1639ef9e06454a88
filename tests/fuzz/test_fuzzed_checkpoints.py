"""Damaged checkpoints: drawn as upstream draws them, or refused in words before the export."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.picks import check_picks

GROUPS = ("checkpoints.Configs", "checkpoints.Tokenizers", "checkpoints.WeightIndices")
IN_MAKE_TEST, IN_SLOW = 10, 215


@pytest.fixture
def subjects(tiny_checkpoint: Path, sd3_checkpoint: Path, mmdit_checkpoint: Path) -> dict[str, Path]:
    return {"sana": tiny_checkpoint, "sd3": sd3_checkpoint, "mmdit": mmdit_checkpoint}


@pytest.mark.parametrize("group", GROUPS)
def test_damage_is_refused_in_words_or_drawn_as_upstream_does(
    group, subjects, tmp_path, record_property
) -> None:
    record_property("found", check_picks(group, IN_MAKE_TEST, subjects, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_much_damage_is_refused_in_words_or_drawn_as_upstream_does(
    group, subjects, tmp_path, record_property
) -> None:
    record_property("found", check_picks(group, IN_SLOW, subjects, tmp_path))


@pytest.mark.slow
def test_odd_command_lines_of_the_exporter_do_what_they_say_or_are_refused(
    tiny_checkpoint, tiny_bundle, tmp_path, record_property
) -> None:
    subjects = {"checkpoint": tiny_checkpoint, "bundle": tiny_bundle}
    found = check_picks("command_lines.CommandLinesOfTheExporter", 100, subjects, tmp_path)
    record_property("found", found)
