"""From `kubectl apply` to a streamed answer: the project's images, manifests and operator.

Operator, gateway and engines run as pods with their own service accounts, the engines in a
namespace that enforces Pod Security `restricted`.
"""

import asyncio
import contextlib
import re
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from cluster import external, images
from cluster.api import Cluster
from cluster.commands import CommandError
from cluster.own import OwnCluster
from openai import AsyncOpenAI
from tokenizers import Tokenizer

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "demo"
SYSTEM, NAMESPACE = "tasuki-system", "models"
PROMPT = "And it came to pass in those days, that there went out a decree to all the world. " * 16
MAX_TOKENS = 40
NOTHING = "example.com/nothing:1"
READY_SECONDS = 240.0
SMALL = {"requests": {"cpu": "50m", "memory": "512Mi"}}
WEIGHTS = (
    {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "weights"},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "capacity": {"storage": "1Gi"},
            "claimRef": {"name": "weights", "namespace": NAMESPACE},
            "hostPath": {"path": str(MODEL), "type": "Directory"},
            "storageClassName": "",
        },
    },
    {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "weights", "namespace": NAMESPACE},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "",
            "volumeName": "weights",
        },
    },
)


def demo(*, decode: int = 1, **engine: Any) -> Object:
    """The demo model on small CPU pods; every prompt is handed over."""
    return {
        "apiVersion": "tasuki.dev/v1alpha1",
        "kind": "InferenceDeployment",
        "metadata": {"name": "demo", "namespace": NAMESPACE},
        "spec": {
            "model": {"source": "pvc://weights"},
            "engine": {"numBlocks": 2048, "numStateSlots": 64, "cpuThreads": 1, **engine},
            "prefill": {"replicas": 1, "resources": SMALL},
            "decode": {"replicas": decode, "resources": SMALL},
            "gateway": {"prefillThreshold": 0},
            "rollout": {"drainSeconds": 30},
        },
    }


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
    crds, overlay = ROOT / "manifests/components/crds", ROOT / "manifests/overlays/dev"
    cluster.kustomize(crds)
    cluster.wait("the CRD is served", lambda: cluster.list("infd") is not None)
    cluster.kustomize(overlay)
    try:
        for name in ("tasuki-redis", "tasuki-operator", "tasuki-gateway"):
            cluster.wait_for_rollout(name, SYSTEM, seconds=120)
        with cluster.namespace(NAMESPACE):
            cluster.apply(*WEIGHTS)
            yield cluster
    finally:
        for folder in (overlay, crds):
            cluster.kubectl(
                "delete", "-k", folder, "--ignore-not-found", "--timeout=90s", timeout=100
            )
        cluster.kubectl("delete", "pv", "weights", "--ignore-not-found")


def apply(cluster: Cluster, wanted: Object) -> None:
    """Applies and waits until the operator says that all of it serves."""
    cluster.apply(wanted)
    generation = cluster.get("infd", "demo", NAMESPACE)["metadata"]["generation"]

    def settled() -> bool:
        found = cluster.get("infd", "demo", NAMESPACE)
        status = found.get("status", {})
        said = {one["type"]: one["status"] for one in status.get("conditions", [])}
        counted = [status.get(role, {}) for role in ("prefill", "decode")]
        return (
            status.get("observedGeneration") == generation
            and said.get("Ready") == "True"
            and said.get("Progressing") == "False"
            and all(role["ready"] == role["replicas"] == role["desired"] for role in counted)
        )

    try:
        cluster.wait("the deployment serves as wanted", settled, seconds=READY_SECONDS)
    except TimeoutError as error:
        seen = cluster.kubectl("describe", "infd,pods", "--namespace", NAMESPACE)
        raise TimeoutError(f"{error}\n{seen}") from error


@contextlib.asynccontextmanager
async def client(cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's SDK at the gateway's Service, without retries."""
    address = cluster.get("service", "tasuki-gateway", SYSTEM)["spec"]["clusterIP"]
    url = f"http://{address}/v1"
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


async def answer(sdk: AsyncOpenAI) -> str:
    """What is streamed after PROMPT, greedily."""
    stream = await sdk.completions.create(
        model="demo", prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0.0, stream=True
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
    """Two clients that ask again and again; every one of their answers must be right."""
    answers: list[str] = []
    stop = asyncio.Event()

    async def ask(sdk: AsyncOpenAI) -> None:
        while not stop.is_set():
            answers.append(await answer(sdk))

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


async def test_an_applied_deployment_streams_what_transformers_computes(
    installed: OwnCluster, expected: str
) -> None:
    apply(installed, demo())
    async with client(installed) as sdk:
        assert await answer(sdk) == expected
    assert counted(installed, "prefill", "prompt_tokens") >= 64
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


def test_a_deleted_deployment_leaves_nothing(installed: OwnCluster) -> None:
    apply(installed, demo())
    installed.kubectl("delete", "infd", "demo", "--namespace", NAMESPACE, "--timeout=60s")
    kinds = "deployments,replicasets,pods,services,configmaps,secrets,networkpolicies,pdb"
    selector = "tasuki.dev/deployment=demo"
    installed.wait(
        "all children are gone",
        lambda: not installed.list(kinds, NAMESPACE, selector),
        seconds=120,
    )
    with pytest.raises(CommandError, match="not found"):
        installed.get("infd", "demo", NAMESPACE)
