"""The cluster for each file of this folder, and why its tests skip where there is none.

TASUKI_TEST_KUBECONFIG and TASUKI_TEST_CONTEXTS name another cluster to use; with
TASUKI_REQUIRE_CLUSTER=1, as in .ci/run, a machine that cannot run one is a failure and no skip.
"""

import os
import random
from collections.abc import Generator, Iterator

import demo_cluster
import operator_process
import pytest
from cluster import external, images, needs
from cluster.api import Cluster
from cluster.own import OwnCluster, running
from operator_process import Operator

LONG = ("operator_crashes", "monitoring_serving", "serving")
"""Files that take many minutes; they begin first, so that none of them is alone in the end."""
LINES = 40


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests; time-outs leave out the fixtures, which may build for minutes."""
    names = [f"test_{name}.py" for name in LONG]
    items.sort(key=lambda one: [*names, one.path.name].index(one.path.name))
    for item in items:
        if item.path.parent.name == "cluster":
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600, func_only=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    """Of a test that fails with the fixture `operator`, what the operator said last."""
    report = yield
    one = getattr(item, "funcargs", {}).get("operator")
    if report.failed and isinstance(one, Operator):
        last = one.log.read_text().splitlines()[-LINES:]
        report.sections.append((f"the last {LINES} lines of the operator", "\n".join(last)))
    return report


@pytest.fixture(scope="session")
def able() -> None:
    """Skips, or fails where CI wants a cluster, on a machine that cannot run one."""
    reason = "" if external.configured() else needs.missing()
    if reason and os.environ.get("TASUKI_REQUIRE_CLUSTER"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(able: None, worker_id: str) -> Iterator[Cluster]:
    """A new cluster with a Ready node; the tests of a file run on its network: no way out.

    Each of pytest-xdist's workers has a machine of its own.
    """
    if external.configured():
        yield external.cluster()
        return
    with running(worker_id) as own:
        yield own


@pytest.fixture
def own_cluster(cluster: Cluster) -> OwnCluster:
    """The cluster, for tests that look into its machine."""
    if not isinstance(cluster, OwnCluster):
        pytest.skip("the tests run on another cluster, whose machines they leave alone")
    return cluster


@pytest.fixture(scope="module")
def operator_flags() -> tuple[str, ...]:
    """Of `operator`; files that want some say which."""
    return ()


@pytest.fixture(scope="module")
def operator(
    cluster: Cluster, operator_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    """An operator as a process with its account's rights alone; nothing it logs may be an error."""
    operator_process.install(cluster)
    folder = tmp_path_factory.mktemp("operator")
    with operator_process.running(cluster, folder, *operator_flags) as one:
        yield one
    assert one.errors() == []


@pytest.fixture
def namespace(cluster: Cluster, operator: Operator) -> Iterator[str]:
    """An empty namespace in which the operator serves.

    Pods leave before it does: else Kubernetes looks again only after half of their grace period.
    """
    with cluster.namespace(f"models-{random.getrandbits(32):x}") as name:
        yield name
        cluster.kubectl("delete", "infd", "--all", "--namespace", name)
        cluster.wait("its pods are gone", lambda: not cluster.list("pods", name))


@pytest.fixture(scope="module")
def built(able: None) -> list[str]:
    """Our images, made before the cluster's network takes the way to the packages."""
    if external.configured():
        pytest.skip("images and a volume of this machine are needed on the node")
    return [images.control(), images.redis(), images.engine()]


@pytest.fixture(scope="module")
def installed(built: list[str], cluster: Cluster) -> Iterator[OwnCluster]:
    """The cluster with everything of overlay `dev` running, and a volume with the demo model."""
    assert isinstance(cluster, OwnCluster)
    cluster.load_images(built)
    with demo_cluster.installed(cluster):
        yield cluster
