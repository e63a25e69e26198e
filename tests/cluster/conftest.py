"""The cluster for each file of this folder, and why its tests skip where there is none.

TASUKI_TEST_KUBECONFIG and TASUKI_TEST_CONTEXTS name another cluster to use; with
TASUKI_REQUIRE_CLUSTER=1, as in CI, a machine that cannot run one is a failure and no skip.
"""

import os
from collections.abc import Iterator

import pytest
from cluster import external, needs
from cluster.api import Cluster
from cluster.own import OwnCluster, running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests; time-outs leave out the fixtures, which may build for minutes."""
    for item in items:
        if item.path.parent.name == "cluster":
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(300, func_only=True))


@pytest.fixture(scope="session")
def able() -> None:
    """Skips, or fails where CI wants a cluster, on a machine that cannot run one."""
    reason = "" if external.configured() else needs.missing()
    if reason and os.environ.get("TASUKI_REQUIRE_CLUSTER"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(able: None) -> Iterator[Cluster]:
    """A new cluster with a Ready node; the tests of a file run on its network: no way out."""
    if external.configured():
        yield external.cluster()
        return
    with running() as own:
        yield own


@pytest.fixture
def own_cluster(cluster: Cluster) -> OwnCluster:
    """The cluster, for tests that look into its machine."""
    if not isinstance(cluster, OwnCluster):
        pytest.skip("the tests run on another cluster, whose machines they leave alone")
    return cluster
