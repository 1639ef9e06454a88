"""The CPU cores that a process may use: its mask and its quota, and what follows from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ditc.runtime import cores
from ditc.runtime.bundle.manifest import load_manifest
from ditc.runtime.cli import main
from ditc.runtime.cores import cpu_quota, default_threads, limit_openmp, most_threads
from ditc.runtime.errors import UsageError
from ditc.runtime.load_options import LoadOptions
from ditc.runtime.sessions.onnxruntime import CPU, OnnxRuntimeSession
from ditc.runtime.spec import DENOISER

# For each case: /proc/self/cgroup, files below /sys/fs/cgroup, and the quota in CPUs.
V1 = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n"
GROUPS: dict[str, tuple[str, dict[str, str], float | None]] = {
    "version 2, no limit": ("0::/user.slice\n", {"user.slice/cpu.max": "max 100000\n"}, None),
    "version 2": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "version 2, the group around it": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 50000"},
        4.0,
    ),
    "version 2, the tightest counts": (
        "0::/a/b\n",
        {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000"},
        2.0,
    ),
    "version 1": (
        V1,
        {
            "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "version 1, no limit": (V1, {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1\n"}, None),
    "version 1, in a container that sees only its own group": (
        V1,
        {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        3.0,
    ),
    "no files": (V1, {}, None),
    "other content": ("0::/\n", {"cpu.max": "many\n"}, None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_the_quota_is_read_from_both_versions_of_control_groups(case: str, tmp_path: Path) -> None:
    membership, files, quota = GROUPS[case]
    (tmp_path / "cgroup").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert cpu_quota(tmp_path / "cgroup", tmp_path / "groups") == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) is None


def machine(
    monkeypatch: pytest.MonkeyPatch, cpus: int, quota: float | None = None, siblings: Path | None = None
) -> None:
    monkeypatch.setattr(cores, "allowed_cpus", lambda: frozenset(range(cpus)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "TOPOLOGY", siblings or Path("/no such folder"))


@pytest.mark.parametrize(
    ("cpus", "quota", "default", "most"),
    [(8, None, 8, 8), (8, 2.5, 2, 3), (8, 0.25, 1, 1), (1, 4.0, 1, 1), (2, 100.0, 2, 2)],
)
def test_threads_follow_the_mask_and_the_quota(
    monkeypatch: pytest.MonkeyPatch, cpus: int, quota: float | None, default: int, most: int
) -> None:
    machine(monkeypatch, cpus, quota)
    assert (default_threads(), most_threads()) == (default, most)


def test_two_threads_of_a_core_count_once_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    machine(monkeypatch, 4, siblings=tmp_path)
    assert (default_threads(), most_threads()) == (2, 4)


def test_a_session_gets_a_number_of_threads_so_that_it_binds_none_of_them(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 1)
    artifact = load_manifest(tiny_bundle).stages[DENOISER].artifacts[0]
    session = OnnxRuntimeSession(tiny_bundle / artifact.file.path, artifact.spec, provider=CPU)
    assert session._session.get_session_options().intra_op_num_threads == 1
    session.close()


@pytest.mark.parametrize("threads", [3, 100_000, 2**31, 2**70])
def test_more_threads_than_cpus_are_cut_with_a_warning(
    threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, 2)
    assert LoadOptions(threads=threads).threads == 2
    assert f"threads is {threads}, but this process may use 2 CPU(s)" in caplog.text


def test_the_command_line_says_once_that_threads_are_cut(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, 1)
    picture = str(tmp_path / "out.png")
    with caplog.at_level(logging.WARNING):
        assert (
            main(["run", str(tiny_bundle), "red cat", "-o", picture, "--threads", "99999", "--steps", "1"])
            == 0
        )
    assert caplog.text.count("threads is 99999") == 1


@pytest.mark.parametrize("threads", [-1, -(2**31), 2.5, "4", True, None])
def test_what_is_not_a_number_of_threads_is_refused(threads: Any) -> None:
    with pytest.raises(UsageError, match=r"threads is .*, which is not a number of threads"):
        LoadOptions(threads=threads)


def test_the_command_line_refuses_negative_threads(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(tiny_bundle), "red cat", "--threads", "-1"]) == 2
    assert "threads is -1" in capsys.readouterr().err


def test_a_quota_is_passed_on_to_openmp_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited: dict[str, str] = {}
    machine(monkeypatch, 4)
    limit_openmp(unlimited)
    machine(monkeypatch, 4, quota=2.0)
    limited, chosen = {}, {"OMP_NUM_THREADS": "3"}
    limit_openmp(limited)
    limit_openmp(chosen)
    assert (unlimited, limited, chosen) == ({}, {"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "3"})
