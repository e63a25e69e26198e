"""The process that holds the engine: torch lives here and nowhere else in a pod.

    main thread     take commands → step → report, and nothing else touches the engine
    reader thread   cuts the socket's bytes into commands
    transfer thread an asyncio loop with the giver or the taker of the hand-over

The other threads talk to the main one through its inbox, so that an idle engine wakes at once and a
busy one sees all that came between two steps. The process ends when it is told to, when its pod's
HTTP process is gone, or when the engine fails; it never goes on with an engine it cannot trust.
"""

import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import msgspec

from tasuki_common import logs
from tasuki_common.errors import ConfigError
from tasuki_engine.engine import Engine
from tasuki_pod.engine_loop import EngineLoop
from tasuki_pod.transfer_agent import TransferAgent
from tasuki_pod.wire import (
    LENGTH,
    Command,
    Crashed,
    Ready,
    Report,
    Start,
    Stop,
    pack,
)

log = logs.get("tasuki.engine_process")

_ORPHAN_SECONDS = 10.0
"""How long a step may still run after the HTTP process is gone."""

Inbox = queue.SimpleQueue[Command | Callable[[], None]]


def main(file_descriptor: int) -> int:
    """Serves the engine over the inherited socket until it ends; the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the HTTP process conducts the drain
    channel = socket.socket(fileno=file_descriptor)
    inbox: Inbox = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(channel, inbox), name="commands", daemon=True)
    reader.start()
    signal.signal(signal.SIGTERM, lambda *_: inbox.put(Stop()))
    start = inbox.get()
    if not isinstance(start, Start):
        return 0
    logs.setup(f"{start.role}-engine", start.log_level, deployment=start.deployment)
    try:
        _serve(start, inbox, channel)
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except ConfigError as error:
        log.error("cannot_start", pod=start.pod, reason=str(error))
        _say_last(channel, Crashed(str(error)))
        return 2
    except Exception as error:
        log.exception("engine_failed", pod=start.pod)
        _say_last(channel, Crashed("".join(traceback.format_exception_only(error)).strip()))
        return 1
    return 0


def _serve(start: Start, inbox: Inbox, channel: socket.socket) -> None:
    begun = time.monotonic()
    engine = Engine(start.engine)
    agent = TransferAgent(start, engine, inbox.put)

    def send(report: Report) -> None:
        channel.sendall(pack(report))

    try:
        host, port, backends = agent.start()
        # Collections go through what requests leave, not through all that imports have made: that
        # takes a tenth of a second, in which no step is launched.
        gc.collect()
        gc.freeze()
        send(
            Ready(
                fingerprint=engine.fingerprint,
                hash_revision=engine.hash_revision,
                hash_algorithm=engine.config.hash_algorithm,
                block_size=engine.config.block_size,
                needs_checkpoint=engine.model.cache_spec.state is not None,
                max_model_len=engine.max_model_len,
                vocab_size=engine.model.vocab_size,
                folder=str(engine.model.folder),
                transfer_host=host,
                transfer_port=port,
                transfer_backends=backends,
                stats=engine.stats(),
            )
        )
        log.info("engine_ready", pod=start.pod, seconds=round(time.monotonic() - begun, 3))
        EngineLoop(engine, agent, inbox, send).run()
    finally:
        agent.stop()
        gc.unfreeze()  # else Triton's bindings say at exit what they could not let go


def _read(channel: socket.socket, inbox: Inbox) -> None:
    """Puts each command into the inbox; at the socket's end a `Stop`, then the process must end."""
    decoder = msgspec.msgpack.Decoder(Command)
    stream = channel.makefile("rb")
    try:
        while len(header := stream.read(LENGTH.size)) == LENGTH.size:
            (size,) = LENGTH.unpack(header)
            if len(body := stream.read(size)) < size:
                break
            inbox.put(decoder.decode(body))
    except msgspec.DecodeError:
        log.exception("command_unreadable")
    finally:
        inbox.put(Stop())
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)


def _say_last(channel: socket.socket, report: Report) -> None:
    try:
        channel.sendall(pack(report))
    except OSError:
        log.warning("http_process_gone")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
