"""From `kubectl apply` to a streamed answer: the project's images, manifests and operator.

Operator, gateway and engines run as pods with their own service accounts, the engines in a
namespace that enforces Pod Security `restricted`.
"""

import asyncio
import contextlib
import itertools
import json
import re
import secrets
import shutil
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import demo_cluster
import httpx
import pytest
import tiny_models
from cluster.api import Cluster
from cluster.commands import CommandError
from cluster.own import OwnCluster
from demo_cluster import MODEL, NAMESPACE, READY_SECONDS, SYSTEM, apply, demo
from openai import AsyncOpenAI
from tokenizers import Tokenizer

Object = dict[str, Any]
PROMPT = "And it came to pass in those days, that there went out a decree to all the world. " * 16
MAX_TOKENS = 40
NOTHING = "example.com/nothing:1"
CHILDREN = (
    "deployments,replicasets,pods,services,configmaps,secrets,serviceaccounts,networkpolicies,pdb"
)
PARTS = {"PrefillReady", "DecodeReady", "IndexReady", "TransferReady"}


@contextlib.asynccontextmanager
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's SDK at the gateway's Service, without retries."""
    url = demo_cluster.endpoint(cluster) + "/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


async def answer(sdk: AsyncOpenAI, salt: str | None = None) -> str:
    """What is streamed after PROMPT, greedily; under a new salt no pod has its prefix yet."""
    stream = await sdk.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        stream=True,
        extra_body={"cache_salt": salt},
    )
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


def counted(cluster: Cluster, role: str, counter: str) -> float:
    """A counter summed over the role's pods that stay and its labels, from their /metrics."""
    total = 0.0
    for pod in cluster.list("pods", NAMESPACE, f"tasuki.dev/role={role}"):
        if "deletionTimestamp" in pod["metadata"]:
            continue
        url = f"http://{pod['status']['podIP']}:8100/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^tasuki_{counter}_total{{.*}} (\S+)$", text, re.MULTILINE)
        total += sum(map(float, found))
    return total


@pytest.fixture(scope="module")
def expected() -> str:
    """The answer as transformers computes it from the same folder."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    tokens = tiny_models.reference_greedy(MODEL, prompt, MAX_TOKENS)
    return str(tokenizer.decode(tokens))


@contextlib.asynccontextmanager
async def load(cluster: Cluster, expected: str) -> AsyncIterator[list[str]]:
    """Two clients that ask again and again; every one of their answers must be right.

    Each prompt is computed anew and, where there is a prefill pod, handed over.
    """
    answers: list[str] = []
    stop = asyncio.Event()

    async def ask(sdk: AsyncOpenAI) -> None:
        while not stop.is_set():
            answers.append(await answer(sdk, secrets.token_hex(8)))

    async with client(cluster) as sdk, asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(ask(sdk))
        try:
            yield answers
        finally:
            stop.set()
    assert set(answers) == {expected}


async def reach(answers: list[str], number: int) -> None:
    """Returns when there are that many answers."""
    async with asyncio.timeout(READY_SECONDS):
        while len(answers) < number:  # noqa: ASYNC110  the clients only append
            await asyncio.sleep(0.1)


def test_an_image_that_is_not_there_is_told_in_words(installed: OwnCluster) -> None:
    wanted = demo()
    wanted["spec"]["decode"]["image"] = NOTHING
    installed.apply(wanted)

    def said() -> bool:
        status = installed.get("infd", "demo", NAMESPACE).get("status", {})
        ready = [one for one in status.get("conditions", []) if one["type"] == "Ready"]
        return bool(ready) and ready[0]["reason"] == "ImagePull" and NOTHING in ready[0]["message"]

    installed.wait("the operator says so", said)


def conditions(cluster: Cluster) -> dict[str, tuple[str, str]]:
    """Status and reason of each condition."""
    status = cluster.get("infd", "demo", NAMESPACE).get("status", {})
    return {one["type"]: (one["status"], one["reason"]) for one in status.get("conditions", [])}


def remove(cluster: Cluster) -> None:
    """Deletes the deployment, and waits until nothing of it is left."""
    where = ["--namespace", NAMESPACE, "--ignore-not-found", "--timeout=60s"]
    cluster.kubectl("delete", "infd", "demo", *where)
    selector = "tasuki.dev/deployment=demo"
    cluster.wait(
        "all children are gone",
        lambda: not cluster.list(CHILDREN, NAMESPACE, selector),
        seconds=120,
    )


def test_conditions_go_from_starting_to_ready_and_never_promise_too_much(
    installed: OwnCluster,
) -> None:
    remove(installed)
    installed.apply(demo())
    seen: list[dict[str, str]] = []

    def done() -> bool:
        said = {kind: status for kind, (status, _) in conditions(installed).items()}
        if said and said not in seen:
            seen.append(said)
        parts = all(said.get(kind) == "True" for kind in PARTS)
        return parts and said.get("Ready") == "True" and said.get("Progressing") == "False"

    installed.wait("the deployment is ready", done, seconds=READY_SECONDS)
    assert (seen[0]["Ready"], seen[0]["Progressing"]) == ("False", "True")
    assert all(said["DecodeReady"] == "True" for said in seen if said["Ready"] == "True")
    ready = [said["Ready"] for said in seen]
    assert ready == sorted(ready), "once ready it stays so"
    assert seen[-1]["Degraded"] == "False"


async def test_an_applied_deployment_streams_what_transformers_computes(
    installed: OwnCluster, expected: str
) -> None:
    apply(installed, demo())
    async with client(installed) as sdk:
        assert await answer(sdk) == expected
    assert counted(installed, "prefill", "prompt_tokens_computed") >= 64
    assert counted(installed, "decode", "transfer_bytes") > 0
    status = installed.get("infd", "demo", NAMESPACE)["status"]
    assert status["fingerprint"]
    assert all(one["message"] for one in status["conditions"])


async def test_scaling_under_load_fails_no_request(installed: OwnCluster, expected: str) -> None:
    apply(installed, demo())
    async with load(installed, expected) as answers:
        for replicas in (3, 1):
            await asyncio.to_thread(apply, installed, demo(decode=replicas))
            await reach(answers, len(answers) + 4)


def fingerprints(cluster: Cluster) -> dict[str, str]:
    """Of the pods that stay, by the names they have in the index."""
    found = {}
    for pod in cluster.list("pods", NAMESPACE, "tasuki.dev/deployment=demo"):
        if "deletionTimestamp" in pod["metadata"]:
            continue
        name = pod["metadata"]["name"]
        for event in events(cluster, name, NAMESPACE, "pod_ready"):
            found[event["pod"]] = event["fingerprint"]
    return found


def events(cluster: Cluster, pod: str, namespace: str, event: str) -> list[dict[str, Any]]:
    """The lines of one event in a pod's log."""
    lines = cluster.logs(pod, namespace).splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    return [one for one in logged if one.get("event") == event]


async def test_other_engine_settings_roll_out_under_load_fail_no_request_and_pair_no_strangers(
    installed: OwnCluster, expected: str
) -> None:
    def is_alone() -> bool:
        return len(installed.list("pods", NAMESPACE, "tasuki.dev/deployment=demo")) == 2

    apply(installed, demo())
    before = fingerprints(installed)
    async with load(installed, expected) as answers:
        await reach(answers, 4)
        rolling = asyncio.create_task(asyncio.to_thread(apply, installed, demo(blockSize=32)))
        degraded = set()
        while not rolling.done():
            degraded.add((await asyncio.to_thread(conditions, installed))["Degraded"])
        await rolling
        await asyncio.to_thread(installed.wait, "the old pods are gone", is_alone)
        await reach(answers, len(answers) + 4)
    assert degraded == {("False", "AsWanted")}
    after = fingerprints(installed)
    pods = before | after
    assert len(set(before.values())) == len(set(after.values())) == 1
    assert len(set(pods.values())) == 2
    pairs = {
        (giver, taker)
        for gateway in installed.list("pods", SYSTEM, "app.kubernetes.io/component=gateway")
        for done in events(installed, gateway["metadata"]["name"], SYSTEM, "request_done")
        for giver, taker in done["pods"]
        if taker in pods and giver is not None
    }
    assert {pods[taker] for _, taker in pairs} == set(pods.values())
    assert all(pods[giver] == pods[taker] for giver, taker in pairs)


@pytest.fixture
def other_weights(installed: OwnCluster, tmp_path: Path) -> Iterator[str]:
    """A claim to the demo model with one bit of its weights changed."""
    folder = tmp_path / "other"
    shutil.copytree(MODEL, folder)
    folder.chmod(0o755)  # pods are not root
    file = folder / "model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[8 + int.from_bytes(weights[:8], "little")] ^= 1  # of the first tensor
    file.write_bytes(weights)
    volume, claim = demo_cluster.weights(NAMESPACE, "others", folder)
    installed.apply(volume, claim)
    yield claim["metadata"]["name"]
    installed.kubectl("delete", "pvc", claim["metadata"]["name"], "--namespace", NAMESPACE)
    installed.kubectl("delete", "pv", volume["metadata"]["name"])


async def test_roles_of_other_weights_are_told_of_and_never_exchange_state(
    installed: OwnCluster, expected: str, other_weights: str
) -> None:
    remove(installed)
    wanted = demo()
    volume = {"name": "model", "persistentVolumeClaim": {"claimName": other_weights}}
    wanted["spec"]["prefill"]["podTemplate"] = {"spec": {"volumes": [volume]}}
    installed.apply(wanted)
    due = ("False", "FingerprintsDiffer")
    installed.wait(
        "the status says so",
        lambda: conditions(installed).get("TransferReady") == due,
        seconds=READY_SECONDS,
    )
    said = conditions(installed)
    assert said["Degraded"] == ("True", "FingerprintsDiffer")
    assert said["Ready"] == ("True", "Serving")
    known = 'tasuki_gateway_pods{model="demo",role="decode"} 1.0'
    url = f"{demo_cluster.endpoint(installed)}/metrics"
    installed.wait("the gateway knows it", lambda: known in httpx.get(url, timeout=30).text)
    async with client(installed) as sdk:
        assert await answer(sdk) == expected
    assert counted(installed, "decode", "transfer_bytes") == 0
    assert counted(installed, "prefill", "prompt_tokens_computed") == 0
    remove(installed)


def asked(gateway: Object, model: str) -> int:
    """The status of one gateway's answer; it waits 30 s for a pod that was there a moment ago."""
    url = f"http://{gateway['status']['podIP']}:8000/v1/completions"
    body = {"model": model, "prompt": "And it came to pass", "max_tokens": 4}
    return httpx.post(url, json=body, timeout=60).status_code


def test_every_gateway_serves_the_models_of_every_namespace(installed: OwnCluster) -> None:
    scale = ("scale", "deployment", "tasuki-gateway", "--namespace", SYSTEM)
    with demo_cluster.namespace(installed, "more"):
        installed.kubectl(*scale, "--replicas=2")
        installed.wait_for_rollout("tasuki-gateway", SYSTEM, seconds=120)
        apply(installed, demo())
        apply(installed, demo(name="other", namespace="more"))
        gateways = installed.list("pods", SYSTEM, "app.kubernetes.io/component=gateway")
        assert len(gateways) == 2
        for model, gateway in itertools.product(("demo", "other"), gateways):
            installed.wait("an answer", lambda g=gateway, m=model: asked(g, m) == 200)
        installed.kubectl("delete", "infd", "other", "--namespace", "more")
        for gateway in gateways:
            installed.wait("it has no pods", lambda g=gateway: asked(g, "other") == 503)
            assert asked(gateway, "demo") == 200
    installed.kubectl(*scale, "--replicas=1")
    installed.wait_for_rollout("tasuki-gateway", SYSTEM)


def test_a_deleted_deployment_leaves_nothing(installed: OwnCluster) -> None:
    apply(installed, demo())
    remove(installed)
    with pytest.raises(CommandError, match="not found"):
        installed.get("infd", "demo", NAMESPACE)
