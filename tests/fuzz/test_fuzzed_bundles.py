"""Damaged bundles and odd calls: refused in words, or done right, and nothing outside is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.picks import check_picks

GROUPS = (
    "bundles.Manifests",
    "bundles.Tokenizers",
    "bundles.GoldenFiles",
    "bundles.Certificates",
    "requests.Requests",
    "command_lines.CommandLines",
)
IN_MAKE_TEST, IN_SLOW = 45, 1560


@pytest.fixture
def subjects(tiny_bundle: Path, sd3_bundle: Path, mmdit_bundle: Path) -> dict[str, Path]:
    return {"sana": tiny_bundle, "sd3": sd3_bundle, "mmdit": mmdit_bundle}


@pytest.mark.parametrize("group", GROUPS)
def test_damage_is_refused_in_words_or_does_what_was_asked(
    group, subjects, tmp_path, record_property
) -> None:
    record_property("found", check_picks(group, IN_MAKE_TEST, subjects, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_much_damage_is_refused_in_words_or_does_what_was_asked(
    group, subjects, tmp_path, record_property
) -> None:
    record_property("found", check_picks(group, IN_SLOW, subjects, tmp_path))
