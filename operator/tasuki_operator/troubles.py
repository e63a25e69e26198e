"""What is wrong with a pod, in one word and one sentence, from its status alone."""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

Manifest = dict[str, Any]

_OUT_OF_MEMORY = "OOMKilled"
_NO_MODEL = re.compile(
    r"the Hub did not give|there is no folder|has no config\.json|has no safetensors", re.IGNORECASE
)
_PULLS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_LAST_LINE = 300
_ORDERS = 1
"""Ends in good order that are no trouble: a probe may have asked for one."""


class Trouble(NamedTuple):
    """Why a pod does not serve."""

    reason: str
    message: str


def worst(pods: Iterable[Manifest]) -> Trouble | None:
    """The first trouble found, those of containers before those of scheduling."""
    found = [trouble for pod in pods if (trouble := of_pod(pod)) is not None]
    return min(found, key=lambda trouble: trouble.reason == "Unschedulable", default=None)


def is_over(pod: Manifest) -> bool:
    """Whether it has ended for good, as evicted pods do: its Deployment replaces it, and it stays
    as a record for long."""
    return (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded")


def of_pod(pod: Manifest) -> Trouble | None:
    """What is wrong with the pod; None when it serves, starts or leaves as it should."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    name = metadata["name"]
    if metadata.get("deletionTimestamp"):
        return None
    if status.get("phase") == "Failed":
        why = status.get("message") or status.get("reason") or "no reason was given"
        return Trouble(str(status.get("reason") or "PodFailed"), f"Pod {name} failed: {why}")
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            text = condition.get("message") or "no node was found"
            return Trouble("Unschedulable", f"Pod {name} has no node: {text}")
    kinds = ("initContainerStatuses", "containerStatuses")
    containers = (container for kind in kinds for container in status.get(kind) or [])
    found = (_of_container(name, container) for container in containers)
    return next((trouble for trouble in found if trouble is not None), None)


def of_deployment(deployment: Manifest | None) -> Trouble | None:
    """Why a Deployment has no pods to look at: a quota, Pod Security, or another admission."""
    for condition in ((deployment or {}).get("status") or {}).get("conditions") or []:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            text = condition.get("message") or "no reason was given"
            return Trouble("PodsRefused", f"Pods may not be made: {text}")
    return None


def _of_container(pod: str, status: Manifest) -> Trouble | None:
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    reason, text = waiting.get("reason"), waiting.get("message") or ""
    if reason in _PULLS:
        return Trouble("ImagePull", f"Pod {pod} cannot get image {status['image']}: {text}")
    if reason == "CreateContainerConfigError":
        return Trouble(_missing(text), f"Pod {pod} cannot start: {text}")
    if reason in ("CreateContainerError", "RunContainerError"):
        return Trouble("CannotStart", f"Pod {pod} cannot start: {text}")
    ended = state.get("terminated") or (status.get("lastState") or {}).get("terminated")
    if status.get("ready") or not ended:
        return None
    if ended.get("exitCode") == 0 and int(status.get("restartCount", 0)) <= _ORDERS:
        return None
    return _of_end(pod, ended, int(status.get("restartCount", 0)))


def _missing(text: str) -> str:
    """What kind of thing the kubelet misses, by its own words."""
    if "secret" in text.lower():
        return "SecretMissing"
    return "ConfigurationMissing" if "configmap" in text.lower() else "CannotStart"


def _of_end(pod: str, ended: Manifest, restarts: int) -> Trouble:
    last = last_line(ended.get("message") or "")
    tail = f" It said last: {last}" if last else ""
    if ended.get("reason") == _OUT_OF_MEMORY:
        return Trouble(
            "OutOfMemory",
            f"Pod {pod} was killed for memory, {restarts} times so far; raise its memory limit, or "
            f"lower spec.engine.numBlocks.{tail}",
        )
    if ended.get("reason") in ("StartError", "ContainerCannotRun"):
        return Trouble("CannotStart", f"Pod {pod} cannot start: {last}")
    if _NO_MODEL.search(last):
        return Trouble("ModelNotFound", f"Pod {pod} finds no model. {last}")
    if ended.get("exitCode") == 2:
        return Trouble("ConfigurationRefused", f"Pod {pod} refuses its settings. {last}")
    code = ended.get("exitCode")
    slow = " It may have been told to, by its startup probe: see spec.rollout.startSeconds."
    why = slow if code == 0 else ""
    return Trouble("CrashLoop", f"Pod {pod} ended with {code}, {restarts} times so far.{why}{tail}")


def last_line(output: str) -> str:
    """The last line of a log; of the pods' JSON lines only the event and its reason."""
    lines = [line for line in output.splitlines() if line.strip()]
    if not lines:
        return ""
    line = lines[-1].strip()
    try:
        fields = json.loads(line)
    except ValueError:
        return line[-_LAST_LINE:]
    if not isinstance(fields, dict):
        return line[-_LAST_LINE:]
    text = str(fields.get("reason") or fields.get("event") or line)
    return text[:_LAST_LINE]
