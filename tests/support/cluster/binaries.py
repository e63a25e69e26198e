"""The programs of a Kubernetes node, built from Go modules once and kept in the cache."""

import functools
import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from . import cache, toolchain
from .commands import run

MODULES = Path(__file__).parent / "go"
BUILD_SECONDS = 3600.0
NODE = ("apiserver", "controller-manager", "scheduler", "proxy")
PROGRAMS = {
    "kubernetes": {
        "etcd": "go.etcd.io/etcd/server/v3",
        "kubectl": "k8s.io/kubernetes/cmd/kubectl",
        "kubelet": "k8s.io/kubernetes/cmd/kubelet",
        **{f"kube-{part}": f"k8s.io/kubernetes/cmd/kube-{part}" for part in NODE},
    },
    "coredns": {"coredns": "github.com/coredns/coredns"},
    "kwok": {"kwok": "sigs.k8s.io/kwok/cmd/kwok"},
    "helm": {"helm": "helm.sh/helm/v3/cmd/helm"},
}


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
    _build(source, PROGRAMS[module], unfinished)
    return unfinished.rename(folder)


def _build(source: Path, programs: Mapping[str, str], folder: Path) -> None:
    """Compiles main packages without debug data; Kubernetes learns its version by the linker."""
    flags = ["-trimpath", "-buildvcs=false", "-mod=readonly", "-tags", "netgo osusergo"]
    command = [toolchain.go(), "build", *flags, "-ldflags", f"-s -w {_version(source)}"]
    # All at once, so that one is compiled while another is linked; modules may fail to download.
    run(
        [*command, "-o", f"{folder}/", *programs.values()],
        timeout=BUILD_SECONDS,
        tries=3,
        cwd=source,
        env=toolchain.environment(),
    )
    for program, package in programs.items():
        (folder / _default_name(package)).rename(folder / program)


def _default_name(package: str) -> str:
    """How `go build` calls the program of a main package."""
    parts = package.split("/")
    return parts[-2] if re.fullmatch(r"v\d+", parts[-1]) else parts[-1]


def _version(source: Path) -> str:
    """Linker flags with the version that go.mod requires; none for a module without Kubernetes."""
    found = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\.\d+)", (source / "go.mod").read_text())
    if found is None:
        return ""
    values = {"gitVersion": f"v{found[1]}", "gitMajor": found[2], "gitMinor": found[3]}
    package = "k8s.io/component-base/version"
    return " ".join(f"-X {package}.{name}={value}" for name, value in values.items())
