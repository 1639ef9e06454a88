"""`ditc parity` as a user runs it: exit codes, certificate, reference files, and the page in a real browser."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from records import make_keys

from ditc.runtime.cli import main

ALL = ["--seeds", "0", "--steps", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle, because parity writes a certificate into it."""
    copy = tmp_path_factory.mktemp("certified") / "bundle"
    shutil.copytree(tiny_bundle, copy)
    return copy


@pytest.fixture(scope="module")
def proven(bundle: Path, tiny_checkpoint: Path) -> tuple[Path, Path, Path, int]:
    """The bundle after a whole run, its page, its reference file, and the exit code. The result is signed."""
    make_keys(bundle.parent)
    page, reference = bundle.parent / "parity.html", bundle.parent / "reference.safetensors"
    files = ["--html", str(page), "--save-reference", str(reference)]
    files += ["--sign", str(bundle.parent / "key.pem")]
    code = main(["parity", str(bundle), "--against", str(tiny_checkpoint), *ALL, *files])
    return bundle, page, reference, code


def test_a_bundle_that_computes_what_pytorch_computes_passes(proven) -> None:
    assert proven[3] == 0


def test_the_end_of_the_text_says_where_the_page_is(bundle, tiny_checkpoint, tmp_path, capsys) -> None:
    page = tmp_path / "parity.html"
    assert (
        main(
            [
                "parity",
                str(bundle),
                "--against",
                str(tiny_checkpoint),
                "--level",
                "graph",
                "--html",
                str(page),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.endswith(f"the page is {page}\n") and page.exists()


def test_the_result_is_in_the_certificate_and_inspect_shows_it(proven, capsys) -> None:
    data = json.loads((proven[0] / "certificate.json").read_text())
    (entry,) = data["entries"]
    assert not any(line["passed"] is False for line in entry["parity"]["lines"])
    assert entry["parity"]["settings"]["num_inference_steps"] == 2
    assert {line["name"] for line in entry["parity"]["lines"]} >= {"graph", "op", "module", "stage", "step"}
    assert len(entry["parity"]["reference"]["weights"]) == 64
    assert main(["inspect", str(proven[0])]) == 0
    assert "parity pass" in capsys.readouterr().out


def test_the_result_is_signed_and_names_the_settings_that_make_it_less_than_a_proof(proven, capsys) -> None:
    """Two steps, where the bundle draws in four."""
    bundle = proven[0]
    key = ["--require-signature", str(bundle.parent / "public.pem")]
    assert main(["sign", str(bundle), "--key", str(bundle.parent / "key.pem")]) == 0
    assert main(["verify", str(bundle), *key]) == 0
    assert "1 record, 1 signed with public.pem" in capsys.readouterr().out
    assert main(["run", str(bundle), "a red heart", *key, "--require-certificate"]) == 2
    assert "proves less than is required: it drew in 2 steps, not 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "nan"], "--budget is nan"),
        (["--budget", "inf"], "--budget is inf"),
        (["--sign", "key.pem", "--level", "op"], "there is nothing to sign"),
        (["--sign", "none.pem"], "none.pem cannot be read as a PEM key"),
    ],
)
def test_a_budget_or_key_without_meaning_is_refused_before_any_work(options, words, bundle, capsys) -> None:
    assert main(["parity", str(bundle), "--against", "no checkpoint", *options]) == 2
    assert words in capsys.readouterr().err


def test_json_has_a_verdict_per_level_and_a_number_per_comparison(bundle, tiny_checkpoint, capsys) -> None:
    assert (
        main(["parity", str(bundle), "--against", str(tiny_checkpoint), *ALL, "--level", "step", "--json"])
        == 0
    )
    data = json.loads(capsys.readouterr().out)
    assert data["pass"] is True
    step = data["levels"][0]
    assert (step["level"], step["stage"], step["metric"]) == ("step", "denoiser", "relative L2")
    assert 0 < step["value"] <= step["bound"] == 1e-5


def test_another_checkpoint_gives_exit_code_1_and_says_where(bundle, other_checkpoint, capsys) -> None:
    arguments = ["parity", str(bundle), "--against", str(other_checkpoint), *ALL, "--no-diffusers"]
    assert main([*arguments, "--level", "graph", "--level", "step"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "stale artifact" in out


def test_a_reference_file_takes_the_place_of_the_checkpoint(proven, capsys) -> None:
    bundle, _, reference, _ = proven
    assert main(["parity", str(bundle), "--reference", str(reference), "--threads", "1", "--json"]) == 0
    levels = {r["level"]: r["verdict"] for r in json.loads(capsys.readouterr().out)["levels"]}
    assert {levels[name] for name in ("op", "stage", "step", "trajectory")} == {"pass"}
    assert levels["graph"] == levels["module"] == "not checked"
    (entry,) = json.loads((bundle / "certificate.json").read_text())["entries"]
    assert entry["parity"]["lines"][0]["passed"] is True, (
        "a run that checked less replaced the certificate of a fuller one"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--steps", "3"], "--steps is 3, but the reference file was made with 2"),
        (["--seeds", "0", "1"], "--seeds is [0, 1], but the reference file was made with [0]"),
        (["--height", "96"], "--height is 96"),
    ],
)
def test_options_that_contradict_a_reference_file_are_refused(change, words, proven, capsys) -> None:
    assert main(["parity", str(proven[0]), "--reference", str(proven[2]), *change]) == 2
    assert words in capsys.readouterr().err


def test_missing_foreign_and_damaged_reference_files_are_refused_by_name(proven, tmp_path, capsys) -> None:
    bundle, _, reference, _ = proven
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(reference.read_bytes()[:5000])
    foreign = next((bundle / "golden").glob("*.safetensors"))
    for path, words in (
        (tmp_path / "no.file", "no reference file"),
        (damaged, "is not a"),
        (foreign, "is not a"),
    ):
        assert main(["parity", str(bundle), "--reference", str(path)]) == 2
        error = capsys.readouterr().err
        assert path.name in error
        assert words in error


@pytest.mark.parametrize("option", ["--html", "--save-reference"])
@pytest.mark.parametrize("place", ["file/out", "."])
def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    option, place, bundle, tmp_path, capsys
) -> None:
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / place
    assert main(["parity", str(bundle), "--against", "no checkpoint", option, str(place)]) == 2
    assert f"cannot write {place}" in capsys.readouterr().err


def test_the_report_is_printed_even_where_a_file_cannot_be_written(
    bundle, tiny_checkpoint, tmp_path, capsys, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ditc.runtime.atomic.os.fsync", full)
    arguments = ["parity", str(bundle), "--against", str(tiny_checkpoint), *ALL, "--level", "graph"]
    for option in ("--html", "--save-reference"):
        assert main([*arguments, option, str(tmp_path / "result")]) == 2
        out, err = capsys.readouterr()
        assert "PASS" in out
        assert "No space left on device" in err


def test_a_reference_file_has_the_permissions_of_the_page(proven) -> None:
    _, page, reference, _ = proven
    assert reference.stat().st_mode == page.stat().st_mode


def test_a_reference_is_needed_and_only_one(bundle, capsys) -> None:
    for given in ([], ["--against", "checkpoint", "--reference", "ref.safetensors"]):
        assert main(["parity", str(bundle), *given]) == 2
        assert "--against CHECKPOINT, or --reference FILE" in capsys.readouterr().err


def test_the_page_opens_in_a_browser_and_needs_nothing_else(proven, tmp_path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("this machine has no chromium, so the page is not rendered")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,2000",
    ]  # fmt: skip
    url = proven[1].as_uri()
    dump = subprocess.run(
        [browser, *flags, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True
    )
    assert "Every bound holds" in dump.stdout
    assert dump.stdout.count("<img") == 3 * 4  # two cases from noise and two from a picture
    assert "<polyline" in dump.stdout
    assert "http" not in proven[1].read_text().replace("http-equiv", "")
    shot = tmp_path / "page.png"
    subprocess.run(
        [browser, *flags, f"--screenshot={shot}", url], capture_output=True, timeout=120, check=True
    )
    assert shot.stat().st_size > 50_000
