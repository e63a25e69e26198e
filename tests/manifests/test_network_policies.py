"""Who reaches whom through the NetworkPolicies of an installation and of a deployment's children.

No enforcer runs here: the policies are evaluated by their specification.
"""

from pathlib import Path
from typing import Any

import outside_tools
import pytest
import yaml
from network_policies import Place, lets_through

from tasuki_operator import builders, names
from tasuki_operator.builders import Owner, Surroundings
from tasuki_operator.config import OperatorConfig
from tasuki_operator.credentials import Credentials
from tasuki_operator.schema import Spec

Object = dict[str, Any]
OVERLAYS = Path(__file__).parents[2] / "manifests/overlays"
SYSTEM, MODELS = "tasuki-system", "models"
METRICS = {"default": "monitoring", "openshift": "openshift-user-workload-monitoring"}
"""Where each platform's Prometheus is."""
DNS = Place("kube-system", {"k8s-app": "kube-dns"})
OUTSIDE = Place()


def made(overlay: str) -> list[Object]:
    """What an overlay brings, and the children of a deployment `granite` in another namespace."""
    text = outside_tools.run(outside_tools.kubectl(), "kustomize", OVERLAYS / overlay)
    objects = list(yaml.safe_load_all(text))
    around = Surroundings(
        image="tasuki/engine:1",
        redis_url="redis://redis:6379",
        system_namespace=SYSTEM,
        metrics_namespace=metrics_namespace(objects),
        pod_monitors=False,
    )
    gpu: Object = {"accelerator": {}}
    spec = Spec.model_validate({"model": {"source": "hf://o/n"}, "prefill": gpu, "decode": gpu})
    owner = Owner(namespace=MODELS, name="granite", uid="u")
    return [*objects, *builders.desired(owner, spec, around, Credentials("d"))]


def metrics_namespace(objects: list[Object]) -> str:
    """Where the operator takes Prometheus to be."""
    (operator,) = (
        body
        for body in objects
        if (body["kind"], body["metadata"]["name"]) == ("Deployment", "tasuki-operator")
    )
    (container,) = operator["spec"]["template"]["spec"]["containers"]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    return values.get("TASUKI_METRICS_NAMESPACE") or OperatorConfig().metrics_namespace


def place(deployment: Object) -> Place:
    """The pods of a Deployment."""
    template = deployment["spec"]["template"]
    ports = {
        port["name"]: port["containerPort"]
        for container in template["spec"]["containers"]
        for port in container["ports"]
    }
    return Place(deployment["metadata"]["namespace"], template["metadata"]["labels"], ports)


class Network:
    """Places by name, and the policies between them."""

    def __init__(self, overlay: str) -> None:
        objects = made(overlay)
        self.policies = [body for body in objects if body["kind"] == "NetworkPolicy"]
        self.places = {
            body["metadata"]["name"].removeprefix("tasuki-").removeprefix("granite-"): place(body)
            for body in objects
            if body["kind"] == "Deployment"
        }
        decode = self.places["decode"]
        self.places |= {
            "dns": DNS,
            "outside": OUTSIDE,
            "prometheus": Place(METRICS[overlay], {"app": "prometheus"}),
            "stranger": Place(MODELS, {"app": "web"}),
            "other model": decode._replace(labels=names.labels("marble", "decode")),
            "false gateway": self.places["gateway"]._replace(namespace=MODELS),
        }

    def reaches(self, source: str, target: str, port: int, protocol: str = "TCP") -> bool:
        """Whether the policies let it."""
        ends = self.places[source], self.places[target]
        return lets_through(self.policies, *ends, port, protocol)


@pytest.fixture(scope="module", params=["default", "openshift"])
def network(request: pytest.FixtureRequest) -> Network:
    """An installation and one deployment on GPUs."""
    return Network(request.param)


NIXL = names.NIXL_PORTS[0]
NEEDED = (
    ("outside", "gateway", 8000),
    ("gateway", "prefill", 8100),
    ("gateway", "decode", 8100),
    ("gateway", "redis", 6379),
    ("gateway", "outside", 6380),
    ("gateway", "outside", 4318),
    ("operator", "redis", 6379),
    ("operator", "outside", 443),
    ("operator", "outside", 6443),
    ("operator", "outside", 8443),
    ("operator", "outside", 16443),
    ("prefill", "redis", 6379),
    ("decode", "redis", 6379),
    ("decode", "prefill", 8200),
    ("decode", "prefill", NIXL),
    ("prefill", "decode", NIXL),
    ("decode", "outside", 443),
    ("prometheus", "gateway", 8000),
    ("prometheus", "operator", 8080),
    ("prometheus", "prefill", 8100),
    ("prometheus", "decode", 8100),
)
FORBIDDEN = (
    ("stranger", "prefill", 8100),
    ("stranger", "decode", 8100),
    ("stranger", "prefill", 8200),
    ("stranger", "redis", 6379),
    ("stranger", "operator", 8080),
    ("outside", "operator", 8080),
    ("stranger", "decode", NIXL),
    ("outside", "decode", 8100),
    ("outside", "redis", 6379),
    ("other model", "prefill", 8200),
    ("other model", "prefill", NIXL),
    ("other model", "decode", 8100),
    ("false gateway", "decode", 8100),
    ("gateway", "prefill", 8200),
    ("prometheus", "prefill", 8200),
    ("prometheus", "redis", 6379),
    ("redis", "outside", 443),
    ("decode", "decode", 8200),
)


@pytest.mark.parametrize(("source", "target", "port"), NEEDED)
def test_what_the_system_needs_is_let_through(
    network: Network, source: str, target: str, port: int
) -> None:
    assert network.reaches(source, target, port)


@pytest.mark.parametrize(("source", "target", "port"), FORBIDDEN)
def test_what_nobody_needs_is_stopped(
    network: Network, source: str, target: str, port: int
) -> None:
    assert not network.reaches(source, target, port)


@pytest.mark.parametrize(("overlay", "port"), [("default", 53), ("openshift", 5353)])
@pytest.mark.parametrize("who", ["gateway", "operator", "prefill", "decode"])
def test_names_are_found_at_the_port_where_the_platforms_servers_listen(
    overlay: str, port: int, who: str
) -> None:
    network = Network(overlay)
    assert network.reaches(who, "dns", port, "UDP")
    assert network.reaches(who, "dns", port)
