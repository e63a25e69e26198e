"""From what is seen to what is said: the status of a deployment, pure.

Ready is true only when a request would be answered: the index lists a decode pod that is ready, and
a gateway is there to send it requests. Prefill pods are not needed for that: without them decode
pods compute the prompts, and Degraded says so.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tasuki_common.messages import Member
from tasuki_operator import troubles
from tasuki_operator.names import ROLES, Role
from tasuki_operator.observed import Observed

Manifest = dict[str, Any]
Truth = Literal["True", "False", "Unknown"]

_TEXT = 1024


class Says(NamedTuple):
    """One condition's content."""

    status: Truth
    reason: str
    message: str


def of(seen: Observed) -> Manifest:
    """The whole status."""
    roles = {role: seen.counts(role) for role in ROLES}
    serving = seen.serving()
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
    if seen.names:
        result["names"] = list(seen.names)
    if seen.spec is not None:
        result["model"] = seen.spec.model.served_name or seen.name
    if seen.spec is not None and seen.spec.gateway.exposed and seen.endpoint:
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
    text = text.rstrip()
    return text if text.endswith((".", "…")) and len(text) <= _TEXT else f"{text[:_TEXT]}."


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
    pods = "1 decode pod answers" if answering == 1 else f"{answering} decode pods answer"
    said = Says("True", "Serving", f"{pods} requests for {_model(seen)}.")
    if not answering:
        before = condition(seen.previous, "Ready").get("status")
        if seen.members is not None or before != "True" or not roles["decode"]["ready"]:
            return _not_answering(seen, roles["decode"])
        said = Says("True", "IndexUnreachable", "Gateways go on with the pods they know.")
    if seen.spec is not None and not seen.spec.gateway.exposed:
        text = "Decode pods are ready; spec.gateway.exposed keeps clients away."
        return Says("True", "NotExposed", text)
    if seen.gateways == 0:
        return Says("False", "NoGateway", "The pods are ready, but no gateway is.")
    return said


def _not_answering(seen: Observed, decode: Manifest) -> Says:
    trouble = seen.trouble("decode")
    if trouble is not None:
        return Says("False", *trouble)
    if seen.members is None:
        return Says("False", "IndexUnreachable", f"The index is away: {seen.index_error}")
    if decode["ready"]:
        return Says("False", "NotInIndex", "Decode pods are ready, but the index lists none yet.")
    return Says("False", "Starting", "No decode pod is ready yet.")


def _model(seen: Observed) -> str:
    return (seen.spec.model.served_name if seen.spec else None) or seen.name


def _role_says(seen: Observed, role: Role, counts: Manifest) -> Says:
    wanted, ready = counts["desired"], counts["ready"]
    if wanted == 0:
        return Says("True", "NotWanted", f"No {role} pods are wanted.")
    if ready >= wanted and not seen.is_rolling(role):
        return Says("True", "AllReady", f"{ready} of {wanted} {role} pods are ready.")
    state = f"{ready} of {wanted} {role} pods are ready."
    trouble = seen.trouble(role)
    if trouble is not None:
        return Says("False", trouble.reason, f"{state} {trouble.message}")
    reason = "Rolling" if ready >= wanted else "Starting"
    return Says("False", reason, state)


def _index_says(seen: Observed) -> Says:
    if seen.members is None:
        return Says("False", "Unreachable", f"The index is away: {seen.index_error}")
    return Says("True", "Reachable", f"The index lists {len(seen.members)} pods.")


def _transfer_says(seen: Observed, serving: Sequence[Member], pair: tuple[str, str] | None) -> Says:
    if seen.wanted("prefill") == 0:
        return Says("True", "NotWanted", "Decode pods compute their prompts themselves.")
    if pair is not None:
        return Says("True", "Paired", f"Prefill and decode pods agree on {pair[1]}.")
    if {member.role for member in serving} != set(ROLES) or any(map(seen.is_rolling, ROLES)):
        return Says("False", "Waiting", "A ready pod of each role and of one revision is needed.")
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


def _progressing(seen: Observed, roles: Mapping[Role, Manifest]) -> Says:
    if seen.refusal is not None:
        return Says("False", *seen.refusal)
    stuck = [role for role in ROLES if seen.is_stuck(role)]
    if stuck:
        return Says("False", "RolloutFailed", _failed_rollout(seen, stuck[0], roles[stuck[0]]))
    rolling = [role for role in ROLES if seen.is_rolling(role)]
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
    trouble = seen.trouble(role)
    status = seen.deployments[role]["status"]
    old = int(status.get("replicas", 0)) - int(status.get("updatedReplicas", 0))
    others = (
        f"{min(old, counts['ready'])} {role} pods of the old revision go on serving."
        if old > 0
        else f"{counts['ready']} of {counts['desired']} {role} pods are ready."
    )
    start = f"The newest {role} pods did not become ready in time; {others}"
    return f"{start} {trouble.message}" if trouble else start


def _degraded(seen: Observed, says: Mapping[str, Says]) -> Says:
    """True for what a person should look at; starting and rolling are no trouble."""
    if seen.refusal is not None:
        return Says("True", *seen.refusal)
    if seen.worry is not None:
        return Says("True", *seen.worry)
    if says["Progressing"].reason == "RolloutFailed":
        return Says("True", "RolloutFailed", says["Progressing"].message)
    found = (
        troubles.worst([*seen.telling("decode"), *seen.telling("prefill")]),
        *(troubles.of_deployment(seen.deployments.get(role)) for role in ("decode", "prefill")),
    )
    trouble = next((trouble for trouble in found if trouble is not None), None)
    if trouble is not None:
        return Says("True", *trouble)
    for kind in ("IndexReady", "TransferReady"):
        if says[kind].status == "False" and says[kind].reason != "Waiting":
            return Says("True", says[kind].reason, says[kind].message)
    if says["Ready"].reason == "NoGateway":
        return Says("True", "NoGateway", says["Ready"].message)
    settled, ready = says["Progressing"].status == "False", says["Ready"]
    if settled and ready.status == "False":
        return Says("True", ready.reason, ready.message)
    if settled and says["PrefillReady"].status == "False":
        return Says(
            "True", "NoPrefill", "No prefill pod is ready; decode pods compute the prompts."
        )
    return Says("False", "AsWanted", "Nothing is wrong.")
