"""A real cluster of one node that a test run makes for itself and ends.

    with running() as cluster:  # or the fixture `cluster` of tests/cluster
        cluster.load_images([images.control()])
        cluster.apply({...})

Built programs and images stay in TASUKI_CLUSTER_CACHE (default ~/.cache/tasuki-cluster).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from . import binaries, cache, control_plane, images, loading, node
from .api import Cluster
from .identities import Identities
from .machine import NAME, Machine

START_SECONDS = 120.0
WATCHED = {"": ["services", "pods", "namespaces"], "discovery.k8s.io": ["endpointslices"]}
RULES = [
    {"apiGroups": [group], "resources": resources, "verbs": ["list", "watch"]}
    for group, resources in WATCHED.items()
]
GROUP = "rbac.authorization.k8s.io"
DNS = (
    {
        "apiVersion": f"{GROUP}/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "coredns"},
        "rules": RULES,
    },
    {
        "apiVersion": f"{GROUP}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "coredns"},
        "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": "coredns"},
        "subjects": [{"apiGroup": GROUP, "kind": "User", "name": "coredns"}],
    },
)


class OwnCluster(Cluster):
    """The cluster on a private machine."""

    def __init__(self, machine: Machine, identities: Identities) -> None:
        super().__init__(binaries.path("kubectl"), identities.path("admin.kubeconfig"), NAME)
        self.machine = machine

    def load_images(self, names: Iterable[str]) -> None:
        for name in names:
            loading.load(self.machine, name)

    def audit(self) -> list[str]:
        """The API server's audit log: a JSON event a line, one for each request it answered."""
        text = (self.machine.folder / "logs" / "audit.log").read_text()
        return text[: text.rfind("\n") + 1].splitlines()  # one may just be written


@contextmanager
def running(place: str = "main") -> Iterator[OwnCluster]:
    """A cluster whose node is Ready; the calling thread is on its network meanwhile.

    Places share programs and images and nothing else. In each there is one at a time: a second
    caller waits until the first is done.
    """
    for programs in binaries.PROGRAMS.values():
        for program in programs:
            binaries.path(program)
    images.busybox()
    with cache.locked(f"machine-{place}"):
        machine = Machine(cache.folder() / f"machine-{place}", cache.folder() / f"store-{place}")
        try:
            with machine.network():
                yield _start(machine)
        finally:
            machine.close()


def _start(machine: Machine) -> OwnCluster:
    """Starts every part and waits for the node."""
    identities = Identities(machine.folder / "identities")
    control_plane.start_api(machine, identities)
    node.start_containerd(machine)
    cluster = OwnCluster(machine, identities)
    cluster.wait("the API server", lambda: _healthy(machine, cluster), seconds=START_SECONDS)
    control_plane.start_controllers(machine, identities)
    cluster.apply(*DNS)
    node.forget_containers(machine)
    cluster.load_images([images.BUSYBOX])
    node.start(machine, identities)
    cluster.wait("the node is Ready", lambda: _ready(machine, cluster), seconds=START_SECONDS)
    return cluster


def _healthy(machine: Machine, cluster: Cluster) -> bool:
    machine.check()
    return cluster.kubectl("get", "--raw", "/readyz") == "ok"


def _ready(machine: Machine, cluster: Cluster) -> bool:
    machine.check()
    conditions = cluster.get("node", NAME)["status"].get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
