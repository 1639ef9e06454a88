"""With private copies, what was hashed is what runs: libraries map a bundle's files and follow writes into them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ditc.runtime.bundle import private_copy as module
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.errors import BundleError, OutputError, UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.loader import load_parts
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request

REQUEST = Request(prompt="red cat", num_inference_steps=2, height=64, width=64, seed=3, output_type="np")
PRIVATE = LoadOptions(private_copy=True)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def test_an_open_pipeline_draws_the_same_whatever_is_written_into_its_bundle(
    bundle: Path, place: Path
) -> None:
    reference = Pipeline.load(bundle)
    expected = reference.draw(REQUEST).images
    reference.close()
    pipeline = Pipeline.load(bundle, options=PRIVATE)
    assert not list(place.iterdir())
    refs = list(load_manifest(bundle).all_files())
    for ref in refs:
        with (bundle / ref.path).open("r+b") as file:
            file.write(bytes(ref.size_bytes))
    assert np.array_equal(pipeline.draw(REQUEST).images, expected)
    for ref in refs:
        (bundle / ref.path).write_bytes(b"")  # a mapped file of the bundle would end the process here: SIGBUS
    assert np.array_equal(pipeline.draw(REQUEST).images, expected)
    pipeline.close()


def test_the_copy_is_what_is_hashed(bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is exchanged after the bundle was checked, before it is copied."""

    def exchange(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-1] + b"!")

    monkeypatch.setattr(module.shutil, "copyfile", exchange)
    with pytest.raises(BundleError, match=r"bundle was changed while it was copied: .* has been changed"):
        load_parts(bundle, PRIVATE)
    assert not list(place.iterdir())


def test_a_copy_that_has_no_room_or_could_not_be_removed_is_refused(
    bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OutputError, match=r"a private copy takes .* GB free") as caught:
            load_parts(bundle, PRIVATE)
    assert "TMPDIR" in str(caught.value.hint)
    monkeypatch.setattr(module, "os", SimpleNamespace(name="nt"))
    with pytest.raises(UsageError, match="only on POSIX"):
        load_parts(bundle, PRIVATE)


def test_what_a_killed_process_left_behind_is_removed_and_nothing_else(
    tiny_bundle: Path, place: Path
) -> None:
    for name in (f"{module.PREFIX}killed", f"{module.PREFIX}alive", "ditc-of-the-user"):
        (place / name).mkdir()
        (place / name / "weights").write_bytes(b"1")
    lock = module._lock(place / f"{module.PREFIX}alive", wait=True)
    (place / f"{module.PREFIX}link").symlink_to(place / "ditc-of-the-user")
    with module.private_copy(tiny_bundle, load_manifest(tiny_bundle).files) as folder:
        left = {path.name for path in place.iterdir() if path != folder}
    os.close(lock)
    assert left == {f"{module.PREFIX}alive", f"{module.PREFIX}link", "ditc-of-the-user"}
    assert (place / "ditc-of-the-user" / "weights").exists()
