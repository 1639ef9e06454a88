"""deploy/kuberay.yaml is what KubeRay and Kubernetes take, runs nothing as root, and exposes nothing of Ray."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ditc.runtime.commands.serve import add_arguments
from ditc.runtime.serving.settings import ServerOptions

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8")
OBJECTS = list(yaml.safe_load_all(TEXT))
CLUSTER = OBJECTS[0]
HEAD = CLUSTER["spec"]["headGroupSpec"]
FRONT, REPLICAS = CLUSTER["spec"]["workerGroupSpecs"]
GROUPS = {"head": HEAD, "front": FRONT, "replicas": REPLICAS}

Check = Callable[[Any, str], None]


def is_a(kind: type) -> Check:
    def check(value: Any, where: str) -> None:
        assert type(value) is kind, f"{where}: {value!r} is no {kind.__name__}"

    return check


def one_of(*values: str) -> Check:
    def check(value: Any, where: str) -> None:
        assert value in values, f"{where}: {value!r} is none of {values}"

    return check


def texts(value: Any, where: str) -> None:
    for name, text in value.items():
        is_a(str)(text, f"{where}.{name}")


def fields(required: dict[str, Check], optional: dict[str, Check]) -> Check:
    """An object with these fields and no others, as the API server prunes or refuses others."""

    def check(value: Any, where: str) -> None:
        assert required.keys() <= value.keys(), f"{where}: {required.keys() - value.keys()} are missing"
        for name, each in value.items():
            known = {**required, **optional}
            assert name in known, f"{where} has no field {name}"
            known[name](each, f"{where}.{name}")

    return check


def anything(value: Any, where: str) -> None:
    assert value is not None, where


def groups(value: Any, where: str) -> None:
    for number, group in enumerate(value):
        WORKER_GROUP(group, f"{where}[{number}]")
    names = [group["groupName"] for group in value]
    assert len(set(names)) == len(names)


# The fields of ray.io/v1 RayCluster, as the types of KubeRay (ray-operator/apis/ray/v1) define them. Templates of pods
# are Kubernetes' own.
GROUP = {
    "resources": texts,
    "labels": texts,
    "rayStartParams": texts,
}
HEAD_GROUP = fields(
    {"template": anything},
    {
        **GROUP,
        "headService": anything,
        "enableIngress": is_a(bool),
        "ingressOptions": anything,
        "serviceType": one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    },
)
WORKER_GROUP = fields(
    {"template": anything, "groupName": is_a(str), "minReplicas": is_a(int), "maxReplicas": is_a(int)},
    {
        **GROUP,
        "suspend": is_a(bool),
        "replicas": is_a(int),
        "idleTimeoutSeconds": is_a(int),
        "priority": is_a(int),
        "scaleStrategy": anything,
        "numOfHosts": is_a(int),
    },
)
RAY_CLUSTER = fields(
    {
        "apiVersion": one_of("ray.io/v1"),
        "kind": one_of("RayCluster"),
        "metadata": fields({"name": is_a(str)}, {"annotations": texts, "labels": texts}),
        "spec": fields(
            {"headGroupSpec": HEAD_GROUP},
            {
                "workerGroupSpecs": groups,
                "rayVersion": is_a(str),
                "enableInTreeAutoscaling": is_a(bool),
                "suspend": is_a(bool),
                "managedBy": is_a(str),
                "headServiceAnnotations": texts,
                "authOptions": fields(
                    {},
                    {
                        "mode": one_of("disabled", "token"),
                        "secretName": is_a(str),
                        "enableK8sTokenAuth": is_a(bool),
                    },
                ),
            },
        ),
    },
    {},
)


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """A pod of every group, as KubeRay makes it from the template."""
    for name, group in GROUPS.items():
        metadata = {"name": name, **group["template"]["metadata"]}
        yield (
            name,
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]},
        )


def container(name: str) -> dict[str, Any]:
    (only,) = GROUPS[name]["template"]["spec"]["containers"]
    return dict(only)


def variables(name: str) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container(name)["env"]}


def test_the_cluster_has_the_fields_of_kuberay() -> None:
    RAY_CLUSTER(CLUSTER, "RayCluster")
    assert [each["groupName"] for each in (FRONT, REPLICAS)] == ["front", "replicas"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cluster: cluster["spec"].update(workers=3),
        lambda cluster: cluster["spec"]["headGroupSpec"].pop("template"),
        lambda cluster: cluster["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda cluster: cluster["spec"]["workerGroupSpecs"][0].update(replicas="1"),
        lambda cluster: cluster["spec"]["workerGroupSpecs"][0].update(groupName="replicas"),
    ],
)
def test_the_check_of_the_fields_finds_mistakes(spoil: Callable[[Any], None]) -> None:
    cluster = next(yaml.safe_load_all(TEXT))
    spoil(cluster)
    with pytest.raises(AssertionError):
        RAY_CLUSTER(cluster, "RayCluster")


def test_kubernetes_accepts_the_pods_and_the_other_objects() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="its schemas take 108 MB: pip install kubernetes-validate"
    ).validate
    for each in [*OBJECTS[1:], *(pod for _, pod in pods())]:
        validate(each, "1.34", strict=True)


def test_the_front_serves_with_options_that_exist() -> None:
    (script,) = container("front")["args"]
    command = script.partition("exec ")[2]
    program, verb, *words = shlex.split(command.replace("\\\n", " "))
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    options = parser.parse_args(words)
    assert (program, verb) == ("ditc", "serve") and options.ray
    (port,) = container("front")["ports"]
    assert options.port == port["containerPort"] == OBJECTS[1]["spec"]["ports"][0]["targetPort"]
    assert options.host == "0.0.0.0" and options.api_keys is not None
    mounts = {mount["mountPath"]: mount for mount in container("front")["volumeMounts"]}
    assert mounts[str(options.api_keys.parent)]["readOnly"] and mounts["/bundles"]["readOnly"]
    assert options.named == ["demo=/bundles/demo"]
    # Every replica finds a pod with its CPUs, also the last one.
    assert options.max_replicas <= REPLICAS["minReplicas"]
    assert str(options.threads) == REPLICAS["rayStartParams"]["num-cpus"]
    assert (
        FRONT["template"]["spec"]["terminationGracePeriodSeconds"]
        > options.drain_seconds
        == ServerOptions().drain_seconds
    )


@pytest.mark.parametrize("name", GROUPS)
def test_every_pod_is_bounded_and_not_root_and_asks_for_the_token(name: str) -> None:
    spec, only = GROUPS[name]["template"]["spec"], container(name)
    assert spec["automountServiceAccountToken"] is False
    security = spec["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    inside = only["securityContext"]
    assert inside["allowPrivilegeEscalation"] is False and inside["readOnlyRootFilesystem"]
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} == only["resources"]["limits"].keys() == only["resources"]["requests"].keys()
    assert all("sizeLimit" in one["emptyDir"] for one in spec["volumes"] if "emptyDir" in one)
    assert variables(name)["RAY_AUTH_MODE"] == "token"
    assert variables(name)["RAY_AUTH_TOKEN"]["secretKeyRef"] == {
        "name": "ditc-ray-token",
        "key": "auth_token",
    }
    assert "KUBERAY_GEN_RAY_START_CMD" in only["args"][0]
    assert {"readinessProbe", "livenessProbe"} <= only.keys()


def test_the_user_of_the_image_is_that_of_the_pods() -> None:
    assert "USER 10001:10001" in (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


def test_health_is_asked_where_the_server_and_ray_answer() -> None:
    only = container("front")
    assert (
        only["readinessProbe"]["httpGet"]
        == only["startupProbe"]["httpGet"]
        == {"path": "/readyz", "port": 8000}
    )
    assert only["livenessProbe"]["httpGet"] == {"path": "/livez", "port": 8000}
    (gcs,) = container("head")["ports"]
    assert container("head")["readinessProbe"]["tcpSocket"]["port"] == gcs["containerPort"]
    node = container("replicas")["readinessProbe"]["tcpSocket"]["port"]
    assert str(node) == REPLICAS["rayStartParams"]["node-manager-port"]
    address = variables("front")["RAY_ADDRESS"]
    assert address == f"{CLUSTER['metadata']['name']}-head-svc:{gcs['containerPort']}"


def test_only_http_is_reached_from_outside_and_no_dashboard_runs() -> None:
    assert HEAD["rayStartParams"]["include-dashboard"] == "false" and HEAD["serviceType"] == "ClusterIP"
    assert {HEAD["rayStartParams"]["num-cpus"], FRONT["rayStartParams"]["num-cpus"]} == {"0"}
    service, ray, http = OBJECTS[1:]
    labels = FRONT["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == http["spec"]["podSelector"]["matchLabels"]
    assert "type" not in service["spec"]  # reached inside of the cluster alone
    everywhere = ray["spec"]["podSelector"]
    assert ray["spec"]["ingress"] == [{"from": [{"podSelector": everywhere}]}]
    for group in GROUPS.values():
        assert everywhere["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    assert [rule["ports"] for rule in http["spec"]["ingress"]] == [[{"protocol": "TCP", "port": 8000}]]
    assert ray["spec"]["policyTypes"] == http["spec"]["policyTypes"] == ["Ingress"]


def test_the_version_of_ray_is_the_tested_one() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints-scale.txt").read_text(encoding="utf-8"), re.M)
    assert pinned is not None and CLUSTER["spec"]["rayVersion"] == pinned[1]
