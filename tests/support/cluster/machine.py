"""A private machine: its own processes, mounts, network and host name, which end with its init.

Everything a node does to a machine (shims, mounts, routes, iptables rules, sysctls) happens to this
one. The kernel ends all of it when the init ends, and the init ends with the process that made it,
even one that was killed. What is left then are empty cgroups and one folder, both removed by
`Machine.close` or by the next run.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import psutil

from .commands import run

NAME = "tasuki-node"
ADDRESS = "10.89.0.2"
CGROUPS = Path("/sys/fs/cgroup")
OWN_FOLDERS = ("/run", "/var/lib", "/var/log")  # where a node keeps its state
TUNABLES = {  # what a kubelet wants of the whole kernel; it gets files that say so
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}
INIT = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
print("up", flush=True)
while True:
    signal.sigwait({signal.SIGCHLD})
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""
START_SECONDS = 20.0
CLONE_NEWNET = 0x40000000


class Machine:
    """One private machine; `close` ends everything in it, and leaves `store` as it is."""

    def __init__(self, folder: str | Path, store: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.store = Path(store) if store else self.folder / "store"
        self.cgroup = f"/tasuki-cluster-{os.getpid()}"
        remove_leftovers(self.folder)
        (self.folder / "logs").mkdir(parents=True)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._log: IO[bytes] = (self.folder / "logs" / "init.log").open("wb")
        kinds = ["--mount", "--net", "--pid", "--ipc", "--uts", "--mount-proc"]
        unshare = ["unshare", *kinds, "--fork", "--kill-child=SIGKILL"]
        command = ["setpriv", "--pdeathsig", "KILL", *unshare, sys.executable, "-c", INIT]
        self._unshare = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
        assert self._unshare.stdout is not None
        if not self._unshare.stdout.readline():
            raise RuntimeError(f"no private machine: {self.log('init')}")
        self.init = psutil.Process(self._unshare.pid).children()[0].pid
        self._make_cgroups()
        self._prepare()

    def close(self) -> None:
        """Ends all processes, and with them every mount and the network; removes the folder."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, 9)
        self._unshare.wait(START_SECONDS)
        for daemon in self._daemons.values():
            daemon.wait(START_SECONDS)
        assert self._unshare.stdout is not None
        self._unshare.stdout.close()
        self._log.close()
        remove_leftovers(self.folder)

    def run(self, *command: object, timeout: float = 60.0, stdin: str | None = None) -> str:
        """What `command` prints when it runs in here; CommandError when it fails."""
        return run([*self._enter(), *command], timeout=timeout, stdin=stdin)

    def start(self, name: str, command: Sequence[object]) -> None:
        """Starts a daemon in here; what it says goes to its log."""
        with (self.folder / "logs" / f"{name}.log").open("wb") as log:
            words = [str(word) for word in (*self._enter(), *command)]
            self._daemons[name] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)

    def log(self, name: str, characters: int = 4000) -> str:
        """The end of a daemon's log."""
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")[-characters:]

    def check(self) -> None:
        """RuntimeError with the end of its log when a daemon has ended."""
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended with {daemon.returncode}:\n{self.log(name)}")

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """While in here, sockets and child processes of the calling thread are on its network."""
        thread = f"/proc/{os.getpid()}/task/{_thread_id()}/ns/net"
        with open(thread) as outside, open(f"/proc/{self.init}/ns/net") as inside:
            _set_network(inside.fileno())
            try:
                yield
            finally:
                _set_network(outside.fileno())

    def _enter(self) -> list[str]:
        kinds = ["--mount", "--net", "--pid", "--ipc", "--uts"]
        return ["nsenter", "--target", str(self.init), *kinds, "--"]

    def _prepare(self) -> None:
        """Network of one bridge without a way out; folders and files that are its own."""
        script = [
            "set -e",
            f"hostname {NAME}",
            "ip link set lo up",
            "ip link add node0 type bridge",
            f"ip address add {ADDRESS}/24 dev node0",
            "ip link set node0 up",
            "ip route add default dev node0",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
        ]
        for path in OWN_FOLDERS:
            own = self.folder / "own" / path.strip("/").replace("/", "-")
            own.mkdir(parents=True)
            script.append(f"mount --bind {own} {path}")
        files = {f"/proc/sys/{name}": f"{value}\n" for name, value in TUNABLES.items()}
        files["/etc/resolv.conf"] = f"nameserver {ADDRESS}\n"
        for path, text in files.items():
            own = self.folder / "own" / path.strip("/").replace("/", "-")
            own.write_text(text)
            script.append(f"mount --bind {own} {path}")
        self.run("sh", "-c", "\n".join(script))

    def _make_cgroups(self) -> None:
        """One empty group for the node's pods in each hierarchy, with all CPUs."""
        for hierarchy in _hierarchies():
            group = hierarchy / self.cgroup.strip("/")
            group.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (group / name).exists() and not (group / name).read_text().strip():
                    (group / name).write_text((hierarchy / name).read_text())


def probe() -> None:
    """Tries what a machine is made of.

    Raises:
        CommandError: no namespaces or mounts.
        OSError: no cgroups.
    """
    kinds = ["--mount", "--net", "--pid", "--ipc", "--uts", "--mount-proc"]
    run(["unshare", *kinds, "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], timeout=30)
    for hierarchy in _hierarchies():
        group = hierarchy / f"tasuki-cluster-{os.getpid()}"
        group.mkdir(exist_ok=True)
        group.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Removes `folder` and the empty cgroups of machines whose makers have ended."""
    for hierarchy in _hierarchies():
        for group in hierarchy.glob("tasuki-cluster-*"):
            owner = int(group.name.rpartition("-")[2])
            if owner == os.getpid() or not psutil.pid_exists(owner):
                _remove_group(group)
    shutil.rmtree(folder, ignore_errors=True)


def _hierarchies() -> list[Path]:
    """Where groups can be made: the unified hierarchy, or each of version 1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]


def _remove_group(group: Path) -> None:
    """Removes a group and those below it; the kernel may take a moment to see that all ended."""
    below = [Path(root) for root, _, _ in os.walk(group, topdown=False)]
    deadline = time.monotonic() + START_SECONDS
    for path in below:
        while path.exists():
            try:
                path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _thread_id() -> int:
    return int(ctypes.CDLL(None).gettid())


def _set_network(descriptor: int) -> None:
    """setns(2), which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot enter the network: {os.strerror(number)}")
