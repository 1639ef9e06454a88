"""Files of keys are read strictly, and no key gets out of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ditc.runtime.errors import UsageError
from ditc.runtime.serving.http import keys
from ditc.runtime.serving.http.keys import find_key, read_keys

ALICE, OPS = "alice-0123456789abcdef", "ops-0123456789abcdef"


def key_file(folder: Path, data: object) -> Path:
    path = folder / "keys.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    path.chmod(0o600)
    return path


def test_keys_have_names_limits_and_rights(tmp_path: Path) -> None:
    alice = {"name": "alice", "key": ALICE, "requests_per_minute": 6}
    alice_key, ops_key = read_keys(
        key_file(tmp_path, {"keys": [alice, {"name": "ops", "key": OPS, "admin": True}]})
    )
    assert (alice_key.name, alice_key.admin, alice_key.limits.requests_per_minute) == ("alice", False, 6)
    assert (ops_key.admin, ops_key.limits.pixel_steps_per_minute) == (True, None)
    assert find_key((alice_key, ops_key), OPS.encode()) is ops_key
    assert find_key((alice_key, ops_key), b"another-0123456789") is None
    assert ALICE not in repr(alice_key)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("", "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
        ({"keys": []}, "no keys"),
        ({"keys": SECRET} if (SECRET := "s3cret-0123456789") else None, "expected a list"),
        ({"keys": [SECRET]}, "expected an object"),
        ({"keys": [{"name": "a", "key": "s3cret"}]}, "must have 16 to 256 characters"),
        ({"keys": [{"name": "a", "key": SECRET + " x"}]}, "without spaces"),
        ({"keys": [{"name": "a", "key": [SECRET]}]}, "expected str"),
        ({"keys": [{"name": "a b", "key": SECRET}]}, "a name has"),
        ({"keys": [{"name": "a", "key": SECRET, "limit": 1}]}, "unknown field 'limit'"),
        ({"keys": [{"name": "a", "key": SECRET, "requests_per_minute": 0}]}, "must be 1 or more"),
        ({"keys": [{"name": "a", "key": SECRET, "requests_per_minute": "9"}]}, "expected int"),
        ({"keys": [{"name": "a", "key": SECRET}, {"name": "a", "key": OPS}]}, "have the same name"),
        ({"keys": [{"name": "a", "key": SECRET}, {"name": "b", "key": SECRET}]}, "have the same key"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_a_key(tmp_path: Path, data: object, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        read_keys(key_file(tmp_path, data))
    assert "s3cret" not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize("path", ["missing.json", ".", "\0"])
def test_a_path_without_a_file_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError):
        read_keys(tmp_path / path)


def test_a_file_that_others_may_write_is_refused_and_one_that_they_may_read_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = key_file(tmp_path, {"keys": [{"name": "alice", "key": ALICE}]})
    with caplog.at_level(logging.WARNING):
        read_keys(path)
        assert not caplog.text
        path.chmod(0o644)
        read_keys(path)
    assert "other users may read the keys" in caplog.text and ALICE not in caplog.text
    path.chmod(0o662)
    with pytest.raises(UsageError, match="may change the keys"):
        read_keys(path)


def test_a_key_is_compared_in_constant_time_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"name": f"k{i}", "key": f"{i}-0123456789abcdef"} for i in range(5)]
    known = read_keys(key_file(tmp_path, {"keys": entries}))
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(len(one) == len(other) == 32)
        return one == other

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    for shown in (b"0-0123456789abcdef", b"4-0123456789abcdef", b"x"):
        compared.clear()
        find_key(known, shown)
        assert compared == [True] * 5
