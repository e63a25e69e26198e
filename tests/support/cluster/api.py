"""What a test does with a cluster: kubectl, and waiting with a deadline."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .commands import CommandError, run

Object = dict[str, Any]
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
WAIT_SECONDS = 60.0


class Cluster:
    """A cluster by its kubeconfig; the calling thread must be on the cluster's network."""

    def __init__(self, kubectl: Path, kubeconfig: Path, context: str) -> None:
        self.kubeconfig = kubeconfig
        self.context = context
        self._kubectl = kubectl

    def kubectl(self, *arguments: object, stdin: str | None = None, timeout: float = 60) -> str:
        """What kubectl prints; CommandError with what it said when it fails."""
        where = ["--kubeconfig", self.kubeconfig, "--context", self.context]
        where += ["--cache-dir", self.kubeconfig.parent / "kubectl-cache"]
        return run([self._kubectl, *where, *arguments], timeout=timeout, stdin=stdin)

    def load_images(self, names: Iterable[str]) -> None:
        """Makes locally built images usable by pods; another cluster has its own ways for that."""

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Server-side apply of `objects`, as a person's tool does it."""
        command = ["apply", "--server-side", "--force-conflicts", "-f", "-"]
        seconds = 60 + len(objects)
        self.kubectl(*command, stdin=yaml.safe_dump_all(objects), timeout=seconds)

    def kustomize(self, folder: Path) -> None:
        """Server-side apply of a kustomize folder."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "-k", folder)

    def get(self, kind: str, name: str, namespace: str = "default") -> Object:
        """One object; CommandError when there is none."""
        text = self.kubectl("get", kind, name, "--namespace", namespace, "--output", "json")
        return dict(json.loads(text))

    def list(self, kind: str, namespace: str = "default", selector: str = "") -> list[Object]:
        """All objects of a kind in a namespace, by a label selector."""
        where = ["--namespace", namespace, "--selector", selector]
        return list(json.loads(self.kubectl("get", kind, *where, "--output", "json"))["items"])

    def logs(self, pod: str, namespace: str = "default", container: str = "") -> str:
        """What a pod has written so far."""
        which = ["--container", container] if container else []
        return self.kubectl("logs", pod, "--namespace", namespace, *which)

    def wait(self, what: str, true: Callable[[], object], *, seconds: float = WAIT_SECONDS) -> None:
        """Returns when `true()` is; a CommandError counts as not yet; TimeoutError with `what`."""
        deadline = time.monotonic() + seconds
        reason = ""
        while True:
            try:
                if true():
                    return
            except CommandError as error:
                reason = f": {error}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {what}{reason}")
            time.sleep(0.2)

    def wait_for_rollout(
        self, deployment: str, namespace: str = "default", *, seconds: float = WAIT_SECONDS
    ) -> None:
        """Returns when all replicas of a Deployment run its newest template and are ready."""
        limit = f"--timeout={seconds:.0f}s"
        where = ["--namespace", namespace, limit]
        command = ["rollout", "status", f"deployment/{deployment}", *where]
        self.kubectl(*command, timeout=seconds + 10)

    @contextmanager
    def namespace(self, name: str, *, restricted: bool = True) -> Iterator[str]:
        """A namespace that is gone with everything in it afterwards."""
        labels = RESTRICTED if restricted else {}
        metadata = {"name": name, "labels": labels}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        self.wait(
            f"the service account of namespace {name}",
            lambda: self.get("serviceaccount", "default", name),
        )
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--timeout=240s", timeout=250)
