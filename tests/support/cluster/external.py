"""A cluster that is there already: only one that a person has named for tests."""

import os
import shutil
from pathlib import Path

from .api import Cluster
from .commands import run

KUBECONFIG = "TASUKI_TEST_KUBECONFIG"
CONTEXTS = "TASUKI_TEST_CONTEXTS"


class RefusedClusterError(RuntimeError):
    """The kubeconfig's context is not on the allow-list; tests would change a cluster in use."""


def configured() -> bool:
    """Whether a kubeconfig is named for tests; KUBECONFIG alone never counts."""
    return bool(os.environ.get(KUBECONFIG))


def cluster() -> Cluster:
    """The cluster of TASUKI_TEST_KUBECONFIG's current context, if TASUKI_TEST_CONTEXTS names it."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise FileNotFoundError("kubectl is not on PATH; tests on another cluster need it")
    kubeconfig = Path(os.environ[KUBECONFIG])
    command = [kubectl, "--kubeconfig", kubeconfig, "config", "current-context"]
    context = run(command, timeout=10).strip()
    allowed = [name.strip() for name in os.environ.get(CONTEXTS, "").split(",") if name.strip()]
    if context not in allowed:
        raise RefusedClusterError(
            f"context {context!r} of {kubeconfig} is not in {CONTEXTS} ({', '.join(allowed)}); "
            "tests create and delete namespaces there, so name it if that is meant"
        )
    return Cluster(Path(kubectl), kubeconfig, context)
