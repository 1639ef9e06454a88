"""The commands of deploy/kuberay.yaml, run here: a head, a front that has the bundle, and a node for replicas."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from ray_server import DRAW, SMALL, below, picture, ray_nodes, replicas
from serving_process import ServerProcess, free_port

pytestmark = pytest.mark.scale
pytest.importorskip("ray", reason="needs the extra: pip install ditc[ray]")

SPEC = next(
    yaml.safe_load_all((Path(__file__).parents[1] / "deploy" / "kuberay.yaml").read_text(encoding="utf-8"))
)["spec"]


def script(group: dict[str, dict[str, dict[str, list[dict[str, list[str]]]]]]) -> list[str]:
    (container,) = group["template"]["spec"]["containers"]
    return [*container["command"], *container["args"]]


def test_the_commands_start_a_server_that_draws(tiny_bundle: Path, tmp_path: Path) -> None:
    front, nodes = SPEC["workerGroupSpecs"]
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": "test", "key": "k" * 40}]}))
    keys.chmod(0o440)
    port, threads = free_port(), int(nodes["rayStartParams"]["num-cpus"])
    shell, flag, text = script(front)
    for there, here in (
        ("/bundles/demo", str(tiny_bundle)),
        ("/run/secrets/ditc/keys.json", str(keys)),
        ("--port 8000", f"--port {port}"),
        ("--host 0.0.0.0", "--host 127.0.0.1"),
    ):
        assert there in text
        text = text.replace(there, here)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def generated(cpus: int) -> dict[str, str]:
        """As KubeRay makes it from rayStartParams, with the ports and the address of this machine."""
        return {**path, "KUBERAY_GEN_RAY_START_CMD": shlex.join(cluster.command(cpus=cpus))}

    with ray_nodes() as cluster:
        cluster.start(script(SPEC["headGroupSpec"]), environment=generated(0))
        # Two replicas in one node, for want of a second one.
        cluster.start(script(nodes), environment=generated(2 * threads), cache=tmp_path / "cache")
        serving = cluster.start(
            [shell, flag, text], environment={**generated(0), "RAY_ADDRESS": cluster.address}
        )
        with (cluster.folder / "node-2.txt").open("rb") as output:
            server = ServerProcess(serving, f"http://127.0.0.1:{port}", output)  # type: ignore[arg-type]
            server.wait_until_ready(120)
            key = {"authorization": f"Bearer {'k' * 40}"}
            assert server.post(DRAW, SMALL)[0] == 401
            assert len(picture(server.post(DRAW, SMALL, key))) > 1000
            assert replicas(server)
            node = below(serving.pid)  # ends with the pod
            assert server.stop(seconds=60) == 0, server.output
            for pid in node:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
