"""The files in deploy/ say what the server understands, and their own programs accept them."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from ditc.runtime.commands.serve import add_arguments
from ditc.runtime.serving.settings import ServerOptions

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "ditc.service").read_text(encoding="utf-8")
DOCKERFILE = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
# Instructions of the Dockerfile, in order.
LINES = re.findall(r"^([A-Z]+) (.*)$", DOCKERFILE, re.MULTILINE)


def setting(name: str) -> str:
    """The value of a line of the unit."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


def parsed(words: list[str]) -> argparse.Namespace:
    """What `ditc serve` understands of these words."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser.parse_args(words)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def needs(program: str) -> str:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    return path or pytest.skip(f"{program} is not installed")


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists."""
    path = tmp_path / "ditc.service"
    path.write_text(UNIT.replace("/opt/ditc/bin/ditc", "/bin/true"), encoding="utf-8")
    return path


def test_systemd_accepts_the_unit(unit: Path) -> None:
    done = run(needs("systemd-analyze"), "verify", unit)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_finds_little_exposure_of_the_unit(unit: Path) -> None:
    done = run(needs("systemd-analyze"), "security", "--offline=true", "--threshold=15", unit)  # of 100
    assert done.returncode == 0, done.stdout[-300:]


def test_the_unit_starts_stops_and_reloads_the_server_as_it_expects() -> None:
    environment = (DEPLOY / "serve.env").read_text(encoding="utf-8")
    arguments = re.findall(r"^DITC_SERVE=(.*)$", environment, re.MULTILINE)[0]
    program, verb, *words = setting("ExecStart").replace("$DITC_SERVE", arguments).split()
    assert (program, verb) == ("/opt/ditc/bin/ditc", "serve")
    assert parsed(words).named == ["demo=/srv/ditc/demo"]
    assert float(setting("TimeoutStopSec")) > ServerOptions().drain_seconds
    assert (setting("KillSignal"), setting("ExecReload")) == ("SIGTERM", "/bin/kill -HUP $MAINPID")
    assert setting("Restart") == "on-failure"


def test_the_image_is_built_from_files_that_exist_and_are_not_ignored() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in ignore
    for words in (shlex.split(rest) for name, rest in LINES if name == "COPY"):
        sources = [] if words[0].startswith("--from") else words[:-1]
        assert [
            source for source in sources if not (ROOT / source).exists() or f"!{source}" not in ignore
        ] == []


def test_the_image_names_its_base_and_does_not_run_as_root() -> None:
    bases = [rest.split()[0] for name, rest in LINES if name == "FROM"]
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", base) for base in bases)
    users = [rest for name, rest in LINES if name == "USER"]
    assert users and not users[-1].startswith(("0", "root"))
    assert {name for name, _ in LINES} <= {
        *("FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL"),
        *("ENTRYPOINT", "CMD"),
    }


def test_the_image_starts_the_server_and_asks_whether_it_is_ready() -> None:
    last = dict(LINES)
    program, verb, *words = json.loads(last["ENTRYPOINT"])
    options = parsed(words + json.loads(last["CMD"]))
    assert (program, verb) == ("/opt/ditc/bin/ditc", "serve")
    assert options.host == "0.0.0.0" and options.api_keys is not None
    assert str(options.port) == last["EXPOSE"] and f":{options.port}/readyz" in last["HEALTHCHECK"]
    code = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[2]
    compile(code, "healthcheck", "exec")


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    nginx, openssl = needs("nginx"), needs("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = run(
        *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x"),
        *("-keyout", key, "-out", certificate),
    )
    assert made.returncode == 0, made.stderr
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    text = text.replace("/etc/ssl/certs/ditc.pem", str(certificate)).replace(
        "/etc/ssl/private/ditc.key", str(key)
    )
    (tmp_path / "site.conf").write_text(text, encoding="utf-8")
    main = tmp_path / "nginx.conf"
    main.write_text(
        f"pid {tmp_path}/pid; events {{}} http {{ include {tmp_path}/site.conf; }}", encoding="utf-8"
    )
    done = run(nginx, "-t", "-c", main, "-e", tmp_path / "error.log")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_packages_of_the_image_serve_without_torch(tmp_path: Path) -> None:
    """What its RUN line installs, in an empty environment. This needs a package index."""
    venv.create(tmp_path / "env", with_pip=True)
    (line,) = (rest for name, rest in LINES if name == "RUN" and "pip install" in rest)
    extras = dict(LINES)["ARG"].removeprefix("EXTRAS=")
    words = shlex.split(line.replace("/opt/ditc", str(tmp_path / "env")).replace("${EXTRAS}", extras))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    listed = run(tmp_path / "env" / "bin" / "pip", "list", "--format", "freeze").stdout.lower()
    assert "uvicorn==" in listed and "torch" not in listed and "diffusers" not in listed
    modules = "ditc.runtime.serving.http.app, ditc.runtime.serving.http.server"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert run(tmp_path / "env" / "bin" / "python", "-I", "-c", code).returncode == 0
    assert run(tmp_path / "env" / "bin" / "ditc", "serve", "--help").returncode == 0


@pytest.mark.slow
def test_docker_builds_the_image() -> None:
    docker = needs("docker")
    if run(docker, "info").returncode:
        pytest.skip("no docker daemon answers")
    done = run(docker, "build", "--quiet", "-f", DEPLOY / "Dockerfile", ROOT)
    assert done.returncode == 0, done.stderr
