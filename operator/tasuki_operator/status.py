"""From what is seen to what is said: the status of a deployment, pure.

Ready is true only when a request would be answered: the index lists a decode pod that is ready, and
a gateway is there to send it requests. Prefill pods are not needed for that: without them decode
pods compute the prompts, and Degraded says so.
"""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tasuki_common.messages import Member
from tasuki_operator import names, troubles
from tasuki_operator.names import ROLES, Role
from tasuki_operator.schema import Spec
from tasuki_operator.troubles import Trouble

Manifest = dict[str, Any]
Truth = Literal["True", "False", "Unknown"]

_TEXT = 1024
_ROLE_CONDITION: Mapping[Role, str] = {"prefill": "PrefillReady", "decode": "DecodeReady"}


class Says(NamedTuple):
    """One condition's content."""

    status: Truth
    reason: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """All that the status is made from."""

    namespace: str
    name: str
    generation: int
    spec: Spec | None
    """None: it does not fit the schema, and `refusal` says why."""
    previous: Manifest
    """The status as it stands."""
    deployments: Mapping[Role, Manifest]
    """Those that exist."""
    pods: Mapping[Role, Sequence[Manifest]]
    members: Sequence[Member] | None
    """Of this deployment, as the index lists them; None: the index does not answer."""
    index_error: str
    gateways: int | None
    """Gateways that are ready; None: not asked."""
    endpoint: str
    refusal: Trouble | None
    """Why the children are not as wanted: the spec, a rival, or the API server."""
    now: datetime.datetime


def of(seen: Observed) -> Manifest:
    """The whole status."""
    roles = {role: _role(seen, role) for role in ROLES}
    serving = _serving(seen)
    pair = _pair(serving)
    says: dict[str, Says] = {
        "Ready": _ready(seen, roles, serving),
        "PrefillReady": _role_says(seen, "prefill", roles["prefill"]),
        "DecodeReady": _role_says(seen, "decode", roles["decode"]),
        "IndexReady": _index_says(seen),
        "TransferReady": _transfer_says(seen, serving, pair),
        "Progressing": _progressing(seen, roles),
    }
    says["Degraded"] = _degraded(seen, says)
    result: Manifest = {
        "observedGeneration": seen.generation,
        "prefill": roles["prefill"],
        "decode": roles["decode"],
        "conditions": [_condition(seen, kind, said) for kind, said in says.items()],
    }
    if seen.spec is not None:
        result["model"] = seen.spec.model.served_name or seen.name
        result["endpoint"] = seen.endpoint
    fingerprint = pair[0] if pair else _fingerprint(serving)
    if fingerprint:
        result["fingerprint"] = fingerprint
    if pair:
        result["transfer"] = pair[1]
    return result


def condition(status: Manifest, kind: str) -> Manifest:
    """The condition of that type; empty when there is none."""
    found = (item for item in status.get("conditions") or [] if item["type"] == kind)
    return next(found, {})


def _condition(seen: Observed, kind: str, said: Says) -> Manifest:
    """The time changes with the status only, as Kubernetes wants it."""
    before = condition(seen.previous, kind)
    now = seen.now.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    same = before.get("status") == said.status
    return {
        "type": kind,
        "status": said.status,
        "reason": said.reason,
        "message": _sentence(said.message),
        "observedGeneration": seen.generation,
        "lastTransitionTime": before["lastTransitionTime"] if same else now,
    }


def _sentence(text: str) -> str:
    """Others' words end without a full stop at times."""
    return text if text.endswith((".", "…")) and len(text) <= _TEXT else f"{text[:_TEXT]}."


def _role(seen: Observed, role: Role) -> Manifest:
    wanted = _wanted(seen, role)
    ready = sum(_is_ready(pod) for pod in seen.pods[role])
    status = seen.deployments.get(role, {}).get("status") or {}
    selector = names.selector(seen.name, role)
    return {
        "desired": wanted,
        "replicas": len([pod for pod in seen.pods[role] if not _is_leaving(pod)]),
        "ready": ready,
        "updated": int(status.get("updatedReplicas", 0)),
        "summary": f"{ready}/{wanted}",
        "selector": ",".join(f"{key}={value}" for key, value in selector.items()),
    }


def _wanted(seen: Observed, role: Role) -> int:
    if seen.spec is None:
        before: Manifest = seen.previous.get(role) or {}
        return int(before.get("desired", 0))
    return (seen.spec.prefill if role == "prefill" else seen.spec.decode).replicas


def _is_leaving(pod: Manifest) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _is_ready(pod: Manifest) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    ready = any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)
    return ready and not _is_leaving(pod)


def _serving(seen: Observed) -> list[Member]:
    """Members that are ready by their own word and by Kubernetes'."""
    ready = {
        f"{seen.namespace}/{pod['metadata']['name']}"
        for role in ROLES
        for pod in seen.pods[role]
        if _is_ready(pod)
    }
    return [member for member in seen.members or () if member.pod in ready and not member.draining]


def _pair(serving: Sequence[Member]) -> tuple[str, str] | None:
    """Fingerprint and transport of a prefill and a decode pod that can work together."""
    for prefill in (member for member in serving if member.role == "prefill"):
        for decode in (member for member in serving if member.role == "decode"):
            common = [name for name in decode.transfer if name in prefill.transfer]
            if decode.fingerprint == prefill.fingerprint and common:
                return decode.fingerprint, common[0]
    return None


def _fingerprint(serving: Sequence[Member]) -> str:
    return next((member.fingerprint for member in serving if member.role == "decode"), "")


def _ready(seen: Observed, roles: Mapping[Role, Manifest], serving: Sequence[Member]) -> Says:
    answering = sum(member.role == "decode" for member in serving)
    if seen.members is None:
        before = condition(seen.previous, "Ready")
        if before.get("status") == "True" and roles["decode"]["ready"]:
            return Says("True", "IndexUnreachable", "Gateways go on with the pods they know.")
    if not answering:
        return _not_answering(seen, roles["decode"])
    if seen.gateways == 0:
        return Says("False", "NoGateway", "The pods are ready, but no gateway is.")
    pods = "1 decode pod answers" if answering == 1 else f"{answering} decode pods answer"
    return Says("True", "Serving", f"{pods} requests for {_model(seen)}.")


def _not_answering(seen: Observed, decode: Manifest) -> Says:
    trouble = seen.refusal or troubles.worst(seen.pods["decode"])
    if trouble is not None:
        return Says("False", *trouble)
    if seen.members is None:
        return Says("False", "IndexUnreachable", f"The index is away: {seen.index_error}.")
    if decode["ready"]:
        return Says("False", "NotInIndex", "Decode pods are ready, but the index lists none yet.")
    return Says("False", "Starting", "No decode pod is ready yet.")


def _model(seen: Observed) -> str:
    return (seen.spec.model.served_name if seen.spec else None) or seen.name


def _role_says(seen: Observed, role: Role, counts: Manifest) -> Says:
    wanted, ready = counts["desired"], counts["ready"]
    if wanted == 0:
        return Says("True", "NotWanted", f"No {role} pods are wanted.")
    if ready >= wanted and not _rolling(seen, role):
        return Says("True", "AllReady", f"{ready} of {wanted} {role} pods are ready.")
    state = f"{ready} of {wanted} {role} pods are ready."
    trouble = seen.refusal or troubles.worst(seen.pods[role])
    if trouble is not None:
        return Says("False", trouble.reason, f"{state} {trouble.message}")
    reason = "Rolling" if ready >= wanted else "Starting"
    return Says("False", reason, state)


def _index_says(seen: Observed) -> Says:
    if seen.members is None:
        return Says("False", "Unreachable", f"The index is away: {seen.index_error}.")
    return Says("True", "Reachable", f"The index lists {len(seen.members)} pods.")


def _transfer_says(seen: Observed, serving: Sequence[Member], pair: tuple[str, str] | None) -> Says:
    if _wanted(seen, "prefill") == 0:
        return Says("True", "NotWanted", "Decode pods compute their prompts themselves.")
    if pair is not None:
        return Says("True", "Paired", f"Prefill and decode pods agree on {pair[1]}.")
    if {member.role for member in serving} != set(ROLES):
        return Says("False", "Waiting", "A ready pod of each role is needed.")
    prints = {role: {m.fingerprint for m in serving if m.role == role} for role in ROLES}
    if not prints["prefill"] & prints["decode"]:
        return Says(
            "False",
            "FingerprintsDiffer",
            f"Prefill pods have {_list(prints['prefill'])}, decode pods {_list(prints['decode'])}; "
            "they never exchange state. Model, dtype and device must be the same.",
        )
    return Says(
        "False", "NoCommonTransport", "Prefill and decode pods have no transport in common."
    )


def _list(items: set[str]) -> str:
    return ", ".join(sorted(items))


def _rolling(seen: Observed, role: Role) -> bool:
    """Whether the role's Deployment is not yet what it was last told to be."""
    deployment = seen.deployments.get(role)
    if deployment is None:
        return True
    status, wanted = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
    return (
        int(status.get("observedGeneration", 0)) < int(deployment["metadata"].get("generation", 0))
        or int(status.get("updatedReplicas", 0)) < wanted
        or int(status.get("replicas", 0)) > wanted
    )


def _stuck(seen: Observed, role: Role) -> bool:
    """Whether the rollout has passed its deadline."""
    status = seen.deployments.get(role, {}).get("status") or {}
    return any(
        item["type"] == "Progressing" and item.get("reason") == "ProgressDeadlineExceeded"
        for item in status.get("conditions") or []
    )


def _progressing(seen: Observed, roles: Mapping[Role, Manifest]) -> Says:
    if seen.refusal is not None:
        return Says("False", *seen.refusal)
    stuck = [role for role in ROLES if _stuck(seen, role)]
    if stuck:
        return Says("False", "RolloutFailed", _failed_rollout(seen, stuck[0], roles[stuck[0]]))
    rolling = [role for role in ROLES if _rolling(seen, role)]
    if rolling:
        state = " ".join(_counts(role, roles[role]) for role in rolling)
        return Says("True", "Rolling", state)
    waiting = [role for role in ROLES if roles[role]["ready"] < roles[role]["desired"]]
    if waiting:
        state = " ".join(_counts(role, roles[role]) for role in waiting)
        return Says("True", "Starting", state)
    return Says("False", "Done", "All pods are as wanted.")


def _counts(role: Role, counts: Manifest) -> str:
    return (
        f"{role}: {counts['updated']} of {counts['desired']} pods are of the newest revision, "
        f"{counts['ready']} ready."
    )


def _failed_rollout(seen: Observed, role: Role, counts: Manifest) -> str:
    trouble = troubles.worst(seen.pods[role])
    old = f"{counts['ready']} {role} pods of the old revision go on serving."
    start = f"The newest {role} pods did not become ready in time; {old}"
    return f"{start} {trouble.message}" if trouble else start


def _degraded(seen: Observed, says: Mapping[str, Says]) -> Says:
    """True for what a person should look at; starting and rolling are no trouble."""
    if seen.refusal is not None:
        return Says("True", *seen.refusal)
    if says["Progressing"].reason == "RolloutFailed":
        return Says("True", "RolloutFailed", says["Progressing"].message)
    trouble = troubles.worst([*seen.pods["decode"], *seen.pods["prefill"]])
    if trouble is not None:
        return Says("True", *trouble)
    for kind in ("IndexReady", "TransferReady"):
        if says[kind].status == "False" and says[kind].reason != "Waiting":
            return Says("True", says[kind].reason, says[kind].message)
    if says["Ready"].reason == "NoGateway":
        return Says("True", "NoGateway", says["Ready"].message)
    settled = says["Progressing"].status == "False"
    if settled and says["Ready"].status == "True" and says["PrefillReady"].status == "False":
        return Says(
            "True", "NoPrefill", "No prefill pod is ready; decode pods compute the prompts."
        )
    return Says("False", "AsWanted", "Nothing is wrong.")
