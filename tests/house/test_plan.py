"""What `tasuki up` would start for a file: the plan alone, nothing is started."""

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest

from tasuki_cli import plan
from tasuki_common.policy import Policy
from tasuki_operator import files

FILE = """\
apiVersion: tasuki.dev/v1alpha1
kind: InferenceDeployment
metadata: {name: granite}
spec:
  model: {source: "hf://a/b", revision: main, aliases: [g, h]}
  engine: {maxModelLen: 4096, device: %s}
  prefill: {replicas: 2}
  decode: {replicas: 1}
"""
AROUND = plan.Surroundings(
    model="a/b",
    host="::1",
    gateway_port=8000,
    pod_ports=[1, 2, 3],
    run_folder=Path("/run/tasuki"),
    redis_server="/bin/redis-server",
    devices=("0",),
    transfer_key="k3y",
    api_key="s3cret",
    log_level="info",
)


def planned(device: str = "auto", **around: object) -> list[plan.Process]:
    deployment = files.parse((FILE % device).encode(), "x.yaml")
    return plan.processes(deployment, dataclasses.replace(AROUND, **around))  # type: ignore[arg-type]


def flag(process: plan.Process, name: str) -> str:
    return process.command[process.command.index(name) + 1]


def test_the_file_becomes_redis_pods_and_a_gateway() -> None:
    names = [process.name for process in planned()]
    assert names == ["redis", "prefill-0", "prefill-1", "decode-0", "gateway"]


def test_pods_share_name_and_engine_and_differ_in_port() -> None:
    pods = [process for process in planned() if process.part in ("prefill", "decode")]
    assert [flag(pod, "--port") for pod in pods] == ["1", "2", "3"]
    for pod in pods:
        assert flag(pod, "--served-name") == "granite"
        assert flag(pod, "--aliases") == "g,h"
        engine = json.loads(flag(pod, "--engine"))
        assert (engine["max_model_len"], engine["revision"]) == (4096, "main")


def test_the_gateway_knows_all_pods_without_redis() -> None:
    *pods, gateway = planned(redis_server=None)
    assert flag(gateway, "--seeds") == ",".join(pod.address for pod in pods)
    assert not any("--redis-url" in process.command for process in planned(redis_server=None))
    assert gateway.address == "http://[::1]:8000"


def test_the_files_limits_hold_at_its_own_gateway_and_what_a_cluster_has_means_nothing() -> None:
    gateway = (
        "  gateway: {exposed: false, limits: {maxRequests: 3}, apiKeySecret: {name: a, key: b}}"
    )
    deployment = files.parse((FILE % "cpu" + gateway).encode(), "x.yaml")
    policy = msgspec.json.decode(plan.policy(deployment), type=Policy)
    assert policy == Policy(max_requests=3)
    for process in planned():
        if process.part in ("prefill", "decode"):
            assert flag(process, "--policy-file") == f"/run/tasuki/{plan.POLICY}"


def test_secrets_stay_out_of_command_lines() -> None:
    for process in planned():
        assert not any("k3y" in part or "s3cret" in part for part in process.command)


@pytest.mark.parametrize(
    ("device", "devices", "backends"),
    [("auto", ("0",), "nixl,tcp"), ("auto", (), "tcp"), ("cpu", ("0",), "tcp")],
)
def test_nixl_is_for_cuda_unless_the_file_says_so(
    device: str, devices: tuple[str, ...], backends: str
) -> None:
    pod = planned(device, devices=devices)[1]
    assert flag(pod, "--transfer-backends") == backends


@pytest.mark.parametrize(
    ("nodes", "chosen", "devices"),
    [
        (["nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"], None, ("0", "1")),
        (["nvidia0", "nvidia1"], "1, GPU-5", ("1", "GPU-5")),
        (["nvidia0", "nvidia1"], "1,-1,0", ("1",)),
        (["nvidia0"], "", ()),
        ([], "0", ()),
    ],
)
def test_devices_are_those_that_cuda_would_show(
    nodes: list[str],
    chosen: str | None,
    devices: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for node in nodes:
        (tmp_path / node).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert plan.cuda_devices(tmp_path) == devices


@pytest.mark.parametrize(
    ("device", "devices", "dealt", "share"),
    [
        ("auto", ("0",), ["0", "0", "0"], 0.3),
        ("cuda", ("2", "GPU-5"), ["2", "GPU-5", "2"], 0.45),
        ("auto", ("0", "1", "2", "3"), ["0", "1", "2"], 0.9),
        ("auto", (), [None] * 3, 0.9),
        ("cpu", ("0", "1"), [None] * 3, 0.9),
    ],
)
def test_pods_are_dealt_out_to_the_devices_and_share_their_memory(
    device: str, devices: tuple[str, ...], dealt: list[str | None], share: float
) -> None:
    pods = [p for p in planned(device, devices=devices) if p.part in ("prefill", "decode")]
    assert [pod.environ.get("CUDA_VISIBLE_DEVICES") for pod in pods] == dealt
    shares = [json.loads(flag(pod, "--engine"))["memory_share"] for pod in pods]
    assert shares == pytest.approx([share] * 3)
