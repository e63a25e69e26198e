"""What a machine must have for a cluster; Debian packages that are missing get installed."""

import functools
import os
import shutil
import sys
from collections.abc import Collection

from . import cache, images, machine, node, toolchain
from .commands import CommandError, run

PACKAGES = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "openssl": "openssl",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "busybox": "busybox-static",
}
PLUGINS = "containernetworking-plugins"
INSTALL_SECONDS = 600.0


ROOM_FOR_ALL, ROOM_FOR_MORE = 20 << 30, 3 << 30
"""Free bytes: before the images are built for the first time, and later."""


@functools.cache
def missing() -> str:
    """Why this machine cannot run a cluster, in a sentence; "" when it can."""
    if not sys.platform.startswith("linux"):
        return f"a cluster's node needs Linux; this is {sys.platform}"
    if os.geteuid() != 0:
        return "a cluster's node needs root, for namespaces, mounts and cgroups"
    free, room = shutil.disk_usage(cache.folder()).free, _room()
    if free < room:
        return f"{cache.folder()} has {free >> 30} GiB left; a cluster's images need {room >> 30}"
    try:
        _install()
        toolchain.go()
        machine.probe()
    except (CommandError, OSError) as error:
        return f"a cluster's node cannot run on this machine: {error}"
    return ""


def _room() -> int:
    return ROOM_FOR_MORE if images.store_folder().is_dir() else ROOM_FOR_ALL


def _install() -> None:
    """Installs the Debian packages of programs that are not here."""
    with cache.locked("packages"):
        packages = {PACKAGES[name] for name in PACKAGES if shutil.which(name) is None}
        if not node.PLUGINS.is_dir():
            packages.add(PLUGINS)
        if packages:
            install(packages)


def install(packages: Collection[str]) -> None:
    """Installs Debian packages.

    Raises:
        CommandError: that is not possible here, or failed.
    """
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise CommandError(f"no apt-get as root; please install {', '.join(sorted(packages))}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "--quiet", "-o", "Acquire::Retries=5", "-o", "DPkg::Lock::Timeout=300"]
    run([*apt, "update"], timeout=INSTALL_SECONDS, env=environment, tries=3)
    command = [*apt, "install", "--yes", "--no-install-recommends", *sorted(packages)]
    run(command, timeout=INSTALL_SECONDS, env=environment, tries=3)
