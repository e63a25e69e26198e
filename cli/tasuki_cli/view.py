"""What a person sees of `tasuki up`: a table of the processes over their last lines."""

import collections
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from tasuki_cli.probe import resident_bytes
from tasuki_cli.supervisor import Child, State

_FRAME = ("ts", "level", "component", "logger", "event", "traceback")
_COLORS = {
    State.READY: "green",
    State.STARTING: "yellow",
    State.UNREADY: "red",
    State.WAITING: "red",
    State.STOPPED: "dim",
}


def readable(name: str, line: str) -> str:
    """One line of a process for a person: JSON events as words, anything else as it is."""
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "event" not in event:
        return f"{name:<11}{line}"
    fields = "".join(f" {key}={_short(event[key])}" for key in event if key not in _FRAME)
    clock = str(event.get("ts", ""))[11:23]
    text = f"{name:<11}{clock} {event.get('level', ''):<8}{event['event']}{fields}"
    return "\n".join([text, *str(event.get("traceback", "")).splitlines()])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class PlainView:
    """Lines on standard error, and the one `ready` line on standard output."""

    def __init__(self, url: str) -> None:
        self._url = url

    def line(self, name: str, text: str) -> None:
        """A line of the process `name`."""
        sys.stderr.write(readable(name, text) + "\n")
        sys.stderr.flush()

    def ready(self) -> None:
        """A request would be answered from now on."""
        sys.stdout.write(f"ready {self._url}\n")
        sys.stdout.flush()

    def refresh(self, children: Sequence[Child]) -> None:
        """Lines tell the states already."""

    def close(self) -> None:
        """Nothing is held."""


class TerminalView:
    """A table that is kept up to date, over the last lines."""

    def __init__(self, url: str) -> None:
        from rich.live import Live

        self._url = url
        self._title = f"starting {url}"
        self._lines: collections.deque[str] = collections.deque(maxlen=200)
        self._live = Live(auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def line(self, name: str, text: str) -> None:
        """A line of the process `name`."""
        self._lines.extend(readable(name, text).splitlines())

    def ready(self) -> None:
        """A request would be answered from now on."""
        self._title = f"ready {self._url}   (Ctrl-C stops)"

    def refresh(self, children: Sequence[Child]) -> None:
        """Draws everything anew."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title, title_justify="left", expand=True)
        for column in ("process", "state", "pid", "memory", "requests", "restarts", "address"):
            table.add_column(column, no_wrap=True)
        for child in children:
            table.add_row(*_cells(child), style=_COLORS[child.state])
        room = max(shutil.get_terminal_size().lines - len(children) - 7, 3)
        recent = list(self._lines)[-room:]
        tail = Text("\n".join(recent), no_wrap=True, overflow="ellipsis")
        self._live.update(Group(table, tail), refresh=True)

    def close(self) -> None:
        """Leaves the last picture standing."""
        self._live.stop()


def _cells(child: Child) -> list[str]:
    memory = f"{resident_bytes(child.pid) / 2**20:.0f} MiB" if child.pid else ""
    requests = "" if child.requests is None else str(child.requests)
    pid = "" if child.pid is None else str(child.pid)
    process = child.process
    restarts = str(child.restarts or "")
    return [process.name, child.state.value, pid, memory, requests, restarts, process.address]
