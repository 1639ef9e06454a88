"""Foreign text on a terminal controls nothing, and streams that cannot be written to end in one error."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ditc.runtime import cli
from ditc.runtime.bundle.manifest import check_inside, load_manifest, save_manifest
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import BundleError, UsageError
from ditc.runtime.printable import Stream, one_line, printable, printable_streams
from ditc.runtime.signals import Terminated, endings_as_interrupts

# A title, a clipboard, a colour, 8-bit CSI, overwriting, direction, invisible tags, a byte that is not UTF-8.
HOSTILE = (
    "a\x1b]0;owned\x07\x1b]52;c;cm0=\x07\x1b[31m\x9b2J\rfine\u202egnp.\u2066\u200b\u2028\U000e0041\udcff\x7fz"
)
FORGED = "x\nhint: rm -rf ~"


def is_safe(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def test_every_character_that_controls_a_terminal_becomes_an_escape() -> None:
    assert printable(HOSTILE) == (
        r"a\x1b]0;owned\x07\x1b]52;c;cm0=\x07\x1b[31m\x9b2J\rfine\u202egnp.\u2066\u200b\u2028\U000e0041\udcff\x7fz"
    )
    plain = "grün 日本語\u3000👩‍🚀 \\x1b\ta\nb"
    assert printable(plain) == plain and printable(printable(HOSTILE)) == printable(HOSTILE)
    assert one_line(FORGED) == r"x\nhint: rm -rf ~"


def test_a_stream_escapes_what_its_encoding_lacks_and_lets_bars_return() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = Stream(raw)
    for text in ("\rhashing 3%", "ä\r日\n"):
        stream.write(text)
    stream.flush()
    assert raw.buffer.getvalue() == b"\rhashing 3%\\xe4\\r\\u65e5\n"  # type: ignore[attr-defined]


def test_the_streams_are_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with printable_streams():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


@pytest.fixture
def hostile_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A sealed bundle whose texts are hostile."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    text = HOSTILE.replace("\udcff", "") + FORGED + "[/red][link=https://example.com]"
    manifest = load_manifest(bundle)
    name, stage = next(iter(manifest.stages.items()))
    artifact = replace(stage.artifacts[0], library=text, targets=(text,), recipe=text)
    posing = replace(artifact, spec=replace(artifact.spec, name=f"stage {text}"))
    stages = {**manifest.stages, name: replace(stage, artifacts=(artifact,))}
    stages[posing.spec.name] = replace(stage, artifacts=(posing,))
    save_manifest(replace(manifest, family=text, checkpoint=text, stages=stages), bundle)
    return bundle


def test_no_verb_lets_a_manifest_control_the_terminal_or_write_lines_of_its_own(
    hostile_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(hostile_bundle)]) == 0
    drawing = ["run", "cat", "-o", str(hostile_bundle / "x.png")]
    for arguments in (["verify", "--run"], drawing, ["verify", "--run", "--json"]):
        main([arguments[0], str(hostile_bundle), *arguments[1:]])
    out, err = capsys.readouterr()
    assert "owned" in out and is_safe(out) and is_safe(err)
    assert not any(line.startswith("hint: rm") for line in (out + err).splitlines())


def test_no_argument_or_log_record_controls_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in ([HOSTILE], ["verify", HOSTILE], ["verify", "x", HOSTILE], ["run", "/", "-o", HOSTILE]):
        assert main(arguments) == USAGE
    assert main(["verify", FORGED]) == USAGE
    record = logging.LogRecord("ditc", logging.WARNING, "", 0, "%s", (HOSTILE + FORGED,), None)
    with printable_streams():
        sys.stderr.write(cli._OneLine("%(message)s").format(record) + "\n")
    err = capsys.readouterr().err
    assert "owned" in err and is_safe(err) and "\nhint: rm" not in err


def test_rich_keeps_its_colours_and_escapes_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    from ditc.runtime.console import SafeConsole

    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    with printable_streams():
        console = SafeConsole(force_terminal=True, color_system="standard", width=400)
        console.print(Text("a\x1b[2J", style="red"), "[link=https://example.com]b")
    assert "\x1b[31ma\\x1b[2J" in raw.getvalue() and "[link=https://example.com]b" in raw.getvalue()


def test_only_the_safe_console_is_used() -> None:
    root = Path(__file__).parents[2]
    sources = [
        path for part in ("runtime", "export", "parity", "calib") for path in (root / part).rglob("*.py")
    ]
    users = [path for path in sources if "rich.console import Console" in path.read_text(encoding="utf-8")]
    assert {path.name for path in users} <= {"console.py", "budget.py"}, "budget.py takes one as an argument"


# Streams that cannot be written to


def ditc(script: str, **environment: str) -> tuple[int, str, list[str]]:
    """The exit code, stdout and stderr's lines of a shell script, in which "$DITC" is the command."""
    command = f'DITC="{sys.executable} -m ditc.runtime.cli"; {script}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("$DITC doctor --help >/dev/full", "cannot write the output: No space left on device"),
        ("$DITC --version >&-", "stdout is closed, but results are printed there"),
        ("$DITC inspect {bundle} | true", "cannot write the output: Broken pipe"),
        ("$DITC inspect {bundle} --json >/dev/full", "cannot write the output: No space left on device"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_error(tiny_bundle: Path, script: str, error: str) -> None:
    code, _, err = ditc(script.format(bundle=tiny_bundle))
    assert (code, err[0], len(err)) == (USAGE, f"error: {error}", 2) and err[1].startswith("hint: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_without_a_stderr_the_exit_code_is_the_same(tmp_path: Path, stderr: str) -> None:
    assert ditc(f"$DITC verify {tmp_path} {stderr}") == (USAGE, "", [])
    code, out, _ = ditc(f"$DITC --version {stderr}")
    assert code == 0 and out.startswith("ditc ")


def test_a_name_that_the_encoding_lacks_is_written_as_escapes(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "grün")
    code, out, err = ditc(f"$DITC verify {tmp_path}/grün", PYTHONIOENCODING="ascii")
    assert code == 0 and r"gr\xfcn: 21 files" in out and not err


# Names that are too long


LONG = "a" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", LONG],
        ["inspect", LONG],
        ["run", LONG, "cat"],
        ["sign", LONG, "--key", "key.pem"],
        ["run", "bundle", "cat", "-o", f"{LONG}.png"],
        ["run", "bundle", "--prompts", LONG],
        ["run", "bundle", "cat", "--preview", LONG],
        ["verify", "bundle", "--require-signature", LONG],
        ["pull", "org/name", "-o", LONG],
        ["push", LONG, "org/name"],
        ["build", LONG, "-o", "out"],
        ["build", "checkpoint", "-o", LONG],
        ["build", "checkpoint", "-o", "out", "--sign", LONG],
        ["convert", LONG, "out"],
        ["parity", LONG, "--against", "checkpoint"],
        ["calibrate", "checkpoint", "-o", f"{LONG}.safetensors"],
    ],
)
def test_a_name_that_is_too_long_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == USAGE
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ") and not list(tmp_path.iterdir())


def test_programs_get_a_bundle_error_for_such_a_name() -> None:
    with pytest.raises(BundleError, match="File name too long"):
        load_manifest(Path(LONG))
    for name in (
        f"onnx/{LONG}",
        "onnx/ä" + "ä" * 127,
        "onnx/\x1b[2J",
        "onnx/\u202egnp",
        "onnx/a\nb",
        "onnx/\ud800",
    ):
        with pytest.raises(BundleError, match="not a plain path"):
            check_inside(name)
    check_inside("onnx/" + "a" * 255)


# Signals


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ending_signals_interrupt_and_those_that_are_ignored_or_handled_stay_so() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, endings_as_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(caught.value, Terminated) and caught.value.number == signal.SIGTERM
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with endings_as_interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# Full disks and keys


@pytest.fixture
def key(tmp_path: Path) -> Path:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "key.pem"
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(*form))
    path.chmod(0o600)
    return path


def test_verify_and_sign_leave_nothing_on_a_full_disk(
    tiny_bundle: Path,
    tmp_path: Path,
    key: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before = sorted(bundle.rglob("*"))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main(["sign", str(bundle), "--key", str(key)]) == USAGE
    assert capsys.readouterr().err.splitlines()[-1].startswith("hint: free some space on that disk")
    assert main(["verify", str(bundle), "--run"]) == 0
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_a_private_key_that_others_can_read_is_warned_about(
    key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ditc.runtime.bundle.signature import load_private_key

    load_private_key(key)
    assert not caplog.messages
    key.chmod(0o640)
    load_private_key(key)
    assert caplog.messages == [f"other users can read the private key {key}; forbid it with chmod 600"]
    with pytest.raises(UsageError):
        load_private_key(key.parent / "missing")


def test_the_path_of_a_private_key_that_no_system_allows_is_refused() -> None:
    pytest.importorskip("cryptography")
    from ditc.runtime.bundle.signature import load_private_key

    with pytest.raises(UsageError, match="cannot be read as a PEM key"):
        load_private_key(Path("a\0b"))
