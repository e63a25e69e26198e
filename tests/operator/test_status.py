"""Ready is said only when a request would be answered, and failures in plain words."""

import dataclasses
import datetime
import json
from typing import Any

import pytest

from tasuki_common.messages import Member
from tasuki_operator import status, troubles
from tasuki_operator.names import Role
from tasuki_operator.observed import Observed
from tasuki_operator.schema import Spec
from tasuki_operator.troubles import Trouble

Manifest = dict[str, Any]
NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
LATER = NOW + datetime.timedelta(hours=1)


def pod(name: str, role: Role, *, ready: bool = True, **fields: Any) -> Manifest:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": {"name": name, "labels": {"tasuki.dev/role": role}},
        "status": {"phase": "Running", "conditions": conditions, **fields},
    }


def member(name: str, role: Role, **fields: Any) -> Member:
    values: Manifest = {
        "pod": f"models/{name}",
        "incarnation": "i",
        "role": role,
        "model": "granite",
        "fingerprint": "f1",
        "url": "http://10.0.0.1:8100",
        "transfer": ("tcp",),
        "max_model_len": 1024,
        "block_size": 16,
        "hash_algorithm": "xxh3",
        "hash_revision": "r",
        "needs_checkpoint": False,
    }
    return Member(**(values | fields))


def deployment(wanted: int = 1, **fields: Any) -> Manifest:
    counts = {"observedGeneration": 1, "updatedReplicas": wanted, "replicas": wanted}
    return {
        "metadata": {"generation": 1},
        "spec": {"replicas": wanted},
        "status": counts | fields,
    }


def healthy(**changes: Any) -> Observed:
    seen = Observed(
        scaled=frozenset(),
        namespace="models",
        name="granite",
        generation=3,
        names=["granite"],
        spec=Spec.model_validate({"model": {"source": "hf://org/name"}}),
        previous={},
        deployments={"prefill": deployment(), "decode": deployment()},
        pods={"prefill": [pod("p", "prefill")], "decode": [pod("d", "decode")]},
        members=[member("p", "prefill"), member("d", "decode")],
        index_error="",
        gateways=1,
        endpoint="http://gateway/v1",
        refusal=None,
        now=NOW,
    )
    return dataclasses.replace(seen, **changes)


def said(seen: Observed, kind: str) -> tuple[str, str]:
    found = status.condition(status.of(seen), kind)
    assert found["message"].endswith(".") or found["message"], kind
    return found["status"], found["reason"]


def test_a_healthy_deployment_is_ready_and_nothing_is_wrong() -> None:
    whole = status.of(healthy())
    values = {item["type"]: item["status"] for item in whole["conditions"]}
    assert values == {
        "Ready": "True",
        "PrefillReady": "True",
        "DecodeReady": "True",
        "IndexReady": "True",
        "TransferReady": "True",
        "Progressing": "False",
        "Degraded": "False",
    }
    assert whole["fingerprint"] == "f1"
    assert whole["transfer"] == "tcp"
    assert whole["names"] == ["granite"]
    assert whole["decode"]["summary"] == "1/1"
    assert whole["observedGeneration"] == 3


def test_ready_pods_that_the_index_does_not_list_answer_nobody() -> None:
    assert said(healthy(members=[]), "Ready") == ("False", "NotInIndex")
    assert said(healthy(members=[]), "Degraded") == ("True", "NotInIndex")


def test_listed_pods_that_are_not_ready_answer_nobody() -> None:
    pods = {"prefill": [], "decode": [pod("d", "decode", ready=False)]}
    assert said(healthy(pods=pods), "Ready")[0] == "False"


def test_a_draining_pod_answers_nobody() -> None:
    members = [member("p", "prefill"), member("d", "decode", draining=True)]
    assert said(healthy(members=members), "Ready")[0] == "False"


def test_without_a_gateway_nobody_is_answered() -> None:
    assert said(healthy(gateways=0), "Ready") == ("False", "NoGateway")
    assert said(healthy(gateways=None), "Ready")[0] == "True"


def test_ready_outlasts_a_lost_index_and_no_lost_gateway() -> None:
    before = status.of(healthy())
    lost = healthy(previous=before, members=None, gateways=0)
    assert said(lost, "Ready") == ("False", "NoGateway")
    back = healthy(previous=status.of(lost), members=None, gateways=1)  # it knows no pods
    assert said(back, "Ready") == ("False", "IndexUnreachable")


def test_a_model_that_is_kept_from_clients_is_as_wanted_and_has_no_endpoint() -> None:
    hidden = {"model": {"source": "hf://org/name"}, "gateway": {"exposed": False}}
    seen = healthy(spec=Spec.model_validate(hidden), gateways=0)
    assert said(seen, "Ready") == ("True", "NotExposed")
    assert said(seen, "Degraded")[0] == "False"
    assert "endpoint" not in status.of(seen)
    assert said(dataclasses.replace(seen, members=[]), "Ready") == ("False", "NotInIndex")


def test_an_index_that_the_gateways_do_not_read_gives_no_endpoint() -> None:
    assert "endpoint" not in status.of(healthy(endpoint="", gateways=None))


def test_a_pod_of_another_operator_with_the_same_name_is_told_while_it_serves() -> None:
    seen = healthy(worry=Trouble("NameTaken", "Pod other/p serves the name."))
    assert said(seen, "Ready")[0] == "True"
    assert said(seen, "Degraded") == ("True", "NameTaken")


def test_without_prefill_pods_requests_are_answered_and_it_says_so() -> None:
    seen = healthy(
        pods={"prefill": [pod("p", "prefill", ready=False)], "decode": [pod("d", "decode")]},
        deployments={
            "prefill": deployment(
                conditions=[{"type": "Progressing", "reason": "ProgressDeadlineExceeded"}]
            ),
            "decode": deployment(),
        },
    )
    assert said(seen, "Ready")[0] == "True"
    assert said(seen, "PrefillReady")[0] == "False"
    assert said(seen, "Degraded") == ("True", "RolloutFailed")


def test_a_lost_index_leaves_a_serving_deployment_serving_and_a_new_one_waiting() -> None:
    before = status.of(healthy())
    assert said(healthy(members=None, previous=before), "Ready") == ("True", "IndexUnreachable")
    assert said(healthy(members=None), "Ready") == ("False", "IndexUnreachable")
    assert said(healthy(members=None, previous=before), "Degraded") == ("True", "Unreachable")


def test_fingerprints_that_differ_are_named() -> None:
    members = [member("p", "prefill", fingerprint="f1"), member("d", "decode", fingerprint="f2")]
    seen = healthy(members=members)
    assert said(seen, "TransferReady") == ("False", "FingerprintsDiffer")
    message = status.condition(status.of(seen), "TransferReady")["message"]
    assert "f1" in message
    assert "f2" in message
    assert said(seen, "Ready")[0] == "True"


def test_fingerprints_that_differ_while_a_rollout_goes_on_are_no_trouble() -> None:
    members = [member("p", "prefill", fingerprint="f2"), member("d", "decode", fingerprint="f1")]
    rolling = {"prefill": deployment(), "decode": deployment(replicas=2)}
    seen = healthy(members=members, deployments=rolling)
    assert said(seen, "TransferReady") == ("False", "Waiting")
    assert said(seen, "Degraded")[0] == "False"


def test_pods_without_a_common_transport_are_told() -> None:
    members = [member("p", "prefill", transfer=("nixl",)), member("d", "decode")]
    assert said(healthy(members=members), "TransferReady") == ("False", "NoCommonTransport")


def test_a_time_of_transition_changes_with_the_status_only() -> None:
    before = status.of(healthy())
    same = status.of(healthy(previous=before, now=LATER))
    assert same == before
    other = status.of(healthy(previous=before, now=LATER, gateways=0))
    assert status.condition(other, "Ready")["lastTransitionTime"].startswith("2026-01-31T13")
    assert status.condition(other, "IndexReady")["lastTransitionTime"].startswith("2026-01-31T12")


def test_a_rollout_is_progress_until_the_last_old_pod_is_gone() -> None:
    for fields in ({"updatedReplicas": 0}, {"replicas": 2}, {"observedGeneration": 0}):
        seen = healthy(deployments={"prefill": deployment(), "decode": deployment(**fields)})
        assert said(seen, "Progressing") == ("True", "Rolling")
        assert said(seen, "Ready")[0] == "True"


def test_a_broken_new_revision_is_told_while_the_old_one_serves() -> None:
    late = [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]
    broken = pod("d2", "decode", ready=False, containerStatuses=[_ended(2, '{"reason": "no"}')])
    seen = healthy(
        deployments={"prefill": deployment(), "decode": deployment(conditions=late, replicas=2)},
        pods={"prefill": [pod("p", "prefill")], "decode": [pod("d", "decode"), broken]},
    )
    assert said(seen, "Ready")[0] == "True"
    assert said(seen, "Progressing") == ("False", "RolloutFailed")
    message = status.condition(status.of(seen), "Degraded")["message"]
    assert "old revision go on serving" in message
    assert "d2" in message


def test_a_failed_rollout_is_not_told_of_the_spec_that_mends_it() -> None:
    late = [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]
    mended = deployment(conditions=late, replicas=2)
    mended["metadata"]["generation"] = 2
    seen = healthy(deployments={"prefill": deployment(), "decode": mended})
    assert said(seen, "Progressing") == ("True", "Rolling")
    assert said(seen, "Degraded")[0] == "False"


def test_a_first_rollout_that_fails_tells_of_no_old_revision() -> None:
    late = [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]
    broken = pod("d2", "decode", ready=False, containerStatuses=[_ended(1, "torn")])
    seen = healthy(
        spec=Spec.model_validate({"model": {"source": "hf://o/n"}, "decode": {"replicas": 2}}),
        deployments={"prefill": deployment(), "decode": deployment(2, conditions=late)},
        pods={"prefill": [pod("p", "prefill")], "decode": [pod("d", "decode"), broken]},
    )
    message = status.condition(status.of(seen), "Progressing")["message"]
    assert "old revision" not in message
    assert "1 of 2 decode pods are ready" in message
    assert "torn" in message


def test_a_pod_that_was_evicted_is_told_until_it_is_replaced() -> None:
    evicted = pod("e", "decode", ready=False)
    evicted["status"] = {"phase": "Failed", "reason": "Evicted", "message": "Disk is full"}
    alone = healthy(pods={"prefill": [pod("p", "prefill")], "decode": [evicted]})
    assert said(alone, "Ready") == ("False", "Evicted")
    assert said(alone, "Degraded") == ("True", "Evicted")
    replaced = healthy(
        pods={"prefill": [pod("p", "prefill")], "decode": [evicted, pod("d", "decode")]}
    )
    assert said(replaced, "Degraded") == ("False", "AsWanted")
    assert status.of(replaced)["decode"]["replicas"] == 1
    starting = [evicted, pod("d", "decode", ready=False)]
    again = healthy(pods={"prefill": [pod("p", "prefill")], "decode": starting})
    assert said(again, "Ready") == ("False", "Starting")


def test_a_spec_that_does_not_fit_is_reported_and_old_counts_stay() -> None:
    before = status.of(healthy())
    refusal = Trouble("InvalidSpec", "spec.engine: blockSize is 24.")
    whole = status.of(healthy(spec=None, refusal=refusal, previous=before))
    assert status.condition(whole, "Degraded")["reason"] == "InvalidSpec"
    assert whole["decode"]["desired"] == 1


def _ended(code: int, message: str, reason: str = "Error") -> Manifest:
    ended = {"exitCode": code, "reason": reason, "message": message}
    return {
        "name": "engine",
        "image": "tasuki/engine:1",
        "ready": False,
        "restartCount": 3,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
        "lastState": {"terminated": ended},
    }


def _waiting(reason: str, message: str) -> Manifest:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"name": "engine", "image": "x/y:1", "ready": False, "restartCount": 0, "state": state}


HUB = "model is 'a/b', which is no local folder and which the Hub did not give: 404"


@pytest.mark.parametrize(
    ("container", "reason", "words"),
    [
        (_waiting("ImagePullBackOff", "not found"), "ImagePull", "x/y:1"),
        (_waiting("CreateContainerConfigError", 'secret "s" not found'), "SecretMissing", '"s"'),
        (
            _waiting("CreateContainerConfigError", "couldn't find key k in Secret models/s"),
            "SecretMissing",
            "key k",
        ),
        (
            _waiting("CreateContainerConfigError", 'configmap "c" not found'),
            "ConfigurationMissing",
            '"c"',
        ),
        (
            _waiting("CreateContainerConfigError", "image will run as root"),
            "CannotStart",
            "as root",
        ),
        (_ended(137, "", "OOMKilled"), "OutOfMemory", "memory"),
        (_ended(128, "exec: no such file", "StartError"), "CannotStart", "no such file"),
        (_ended(1, "first\nlast words\n"), "CrashLoop", "last words"),
        (_ended(0, ""), "CrashLoop", "startSeconds"),
        (
            _ended(2, json.dumps({"reason": "port 1 cannot be used"})),
            "ConfigurationRefused",
            "port",
        ),
        (_ended(2, json.dumps({"reason": HUB})), "ModelNotFound", "Hub"),
    ],
)
def test_a_pods_trouble_is_told_plainly(container: Manifest, reason: str, words: str) -> None:
    found = troubles.of_pod(pod("d", "decode", ready=False, containerStatuses=[container]))
    assert found is not None
    assert found.reason == reason
    assert words in found.message
    assert "d" in found.message


def test_what_runs_before_the_engine_may_be_the_trouble() -> None:
    first = pod("d", "decode", ready=False, initContainerStatuses=[_ended(1, "no network")])
    found = troubles.of_pod(first)
    assert found is not None
    assert "no network" in found.message
    done = _ended(0, "") | {"ready": True, "state": {"terminated": {"exitCode": 0}}}
    assert troubles.of_pod(pod("d", "decode", initContainerStatuses=[done])) is None


def test_a_pod_that_leaves_or_starts_is_no_trouble() -> None:
    leaving = pod("d", "decode", ready=False, containerStatuses=[_ended(1, "x")])
    leaving["metadata"]["deletionTimestamp"] = "2026-01-31T12:00:00Z"
    assert troubles.of_pod(leaving) is None
    told_to = _ended(0, "") | {"restartCount": 1}
    assert troubles.of_pod(pod("d", "decode", ready=False, containerStatuses=[told_to])) is None
    starting = _waiting("ContainerCreating", "")
    assert troubles.of_pod(pod("d", "decode", ready=False, containerStatuses=[starting])) is None


def test_pods_that_may_not_be_made_say_who_forbids_it() -> None:
    text = 'pods "granite-decode-1" is forbidden: exceeded quota: team'
    failure = {"type": "ReplicaFailure", "status": "True", "message": text}
    refused = deployment(conditions=[failure], replicas=0, updatedReplicas=0)
    seen = healthy(deployments={"prefill": deployment(), "decode": refused}, members=[])
    seen = dataclasses.replace(seen, pods={"prefill": seen.pods["prefill"], "decode": []})
    for kind in ("Ready", "DecodeReady"):
        assert said(seen, kind) == ("False", "PodsRefused")
        assert "exceeded quota" in status.condition(status.of(seen), kind)["message"]
    assert said(seen, "Degraded") == ("True", "PodsRefused")


def test_a_pod_that_no_node_takes_says_what_the_scheduler_said() -> None:
    conditions = [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes have a GPU."}]
    lost = pod("d", "decode", ready=False)
    lost["status"] |= {"phase": "Pending", "conditions": conditions}
    found = troubles.of_pod(lost)
    assert found == Trouble("Unschedulable", "Pod d has no node: 0/3 nodes have a GPU.")
