"""`ditc serve --ray` on a cluster of two nodes: one has no bundle, and is lost in the middle of requests.

Both nodes are on this machine: each is a `ray start` with one CPU, so each holds one replica. The second one runs in a
mount namespace of its own, in which the folder of the bundle is empty.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray_server import DRAW, LONG, SMALL, Nodes, alive, below, picture, ray_nodes, replicas, until
from serving_process import ServerProcess, server_process

from ditc.runtime.bundle.integrity import check_bundle
from ditc.runtime.bundle.manifest import load_manifest

pytestmark = pytest.mark.scale
pytest.importorskip("ray", reason="needs the extra: pip install ditc[ray]")

HIDING = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]


def hiding(folder: Path) -> list[str]:
    """What runs the command behind it in a namespace where the folder is empty."""
    return [*HIDING, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("front") / "tiny"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("second") / "cache"


@pytest.fixture(scope="module")
def server(nodes: Nodes, bundle: Path, cache: Path) -> Iterator[ServerProcess]:
    if subprocess.run([*HIDING, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may make no mount namespace, which hides the bundle from a node")
    nodes.start()
    nodes.start(before=hiding(bundle), cache=cache)
    options = ("--ray", "--min-replicas", "2", "--hang-seconds", "4")
    with server_process(
        bundle, *options, ready=False, environment={**nodes.token, "RAY_ADDRESS": nodes.address}
    ) as process:
        process.wait_until_ready(120)
        until(lambda: len(replicas(process)) == 2)
        yield process
        assert process.stop(seconds=60) == 0, process.output
        assert not any(alive(pid) for pid in replicas(process))


def test_a_node_without_the_bundle_gets_it_from_the_front(
    server: ServerProcess, bundle: Path, cache: Path
) -> None:
    digest = load_manifest(bundle).digest
    place = cache / "ditc" / "bundles" / digest
    assert server.output.count("from the front") == 1 and f"in {place}" in server.output
    check_bundle(place, load_manifest(place))
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.post, DRAW, SMALL) for _ in range(8)]
        assert len({picture(answer.result()) for answer in answers}) == 1


def test_requests_of_a_lost_node_are_answered_by_the_other_and_a_new_node_takes_its_place(
    server: ServerProcess, nodes: Nodes, bundle: Path, cache: Path
) -> None:
    expected = picture(server.post(DRAW, LONG))
    second = nodes.started[1]
    (victim,) = [pid for pid in replicas(server) if pid in below(second.pid)]
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.post, DRAW, LONG) for _ in range(2)]
        until(lambda: b'ditc_running{model="tiny"} 2' in server.get("/metrics")[2])
        nodes.kill(second)
        assert [picture(answer.result()) for answer in answers] == [expected] * 2
    assert "waits for another replica" in server.output
    assert len(replicas(server)) == 1 and victim not in replicas(server)
    nodes.start(before=hiding(bundle), cache=cache)
    until(lambda: len(replicas(server)) == 2)
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.post, DRAW, LONG) for _ in range(2)]
        assert [picture(answer.result()) for answer in answers] == [expected] * 2
