"""Images without a registry: Debian stands in for public bases, buildah builds the Dockerfiles."""

import functools
import os
import shutil
import tomllib
from pathlib import Path

from . import cache, store
from .commands import run

REPOSITORY = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent / "images"
DEBIAN = "docker.io/library/debian:bookworm-slim"
PYTHON = "docker.io/library/python:3.11-slim-bookworm"
REDIS = "docker.io/library/redis:7.0-bookworm"
BUSYBOX = "docker.io/tasuki/busybox:1"
BUILD_SECONDS = 1500.0
ROOM = 8 << 30
"""Free bytes that a new version of the largest image may take."""


@functools.cache
def version() -> str:
    """The project's version, which is its images' tag."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    return str(tomllib.loads(text)["project"]["version"])


def control() -> str:
    """Builds operator/Dockerfile; the image's name."""
    name = f"docker.io/tasuki/control:{version()}"
    return build(name, REPOSITORY / "operator" / "Dockerfile", REPOSITORY, base=python())


def engine() -> str:
    """Builds engine/Dockerfile for CPUs; the image's name."""
    name = f"docker.io/tasuki/engine:{version()}"
    dockerfile = REPOSITORY / "engine" / "Dockerfile"
    return build(name, dockerfile, REPOSITORY, base=python(), arguments=("COMPILER=",))


def python() -> str:
    """The stand-in for Python's image; its name."""
    return build(PYTHON, HERE / "python" / "Dockerfile", HERE / "python", base=debian())


def redis() -> str:
    """The stand-in for Redis' image; its name."""
    return build(REDIS, HERE / "redis" / "Dockerfile", HERE / "redis", base=debian())


def busybox() -> str:
    """An image of one static program, of which sandboxes and small test pods are made; its name."""
    context = cache.folder() / "images" / "busybox"
    context.mkdir(parents=True, exist_ok=True)
    new = context.with_name(f"busybox-{os.getpid()}")  # another process may be reading the old one
    shutil.copy2(shutil.which("busybox") or "/bin/busybox", new)
    new.replace(context / "busybox")
    return build(BUSYBOX, HERE / "busybox" / "Dockerfile", context)


@functools.cache
def debian() -> str:
    """A minimal Debian from its packages, made once; the image's name."""
    with cache.locked("images"):
        if not _identity(DEBIAN):
            _bootstrap()
    return DEBIAN


def _bootstrap() -> None:
    """Makes the image DEBIAN."""
    root = cache.folder() / "images" / "rootfs"
    include = "--include=ca-certificates"
    command = ["debootstrap", "--variant=minbase", include, "bookworm", root]
    anew = ["unshare", "--mount", "sh", "-c", 'rm -rf "$0" && exec "$@"', root]
    run([*anew, *command], timeout=BUILD_SECONDS, tries=3)
    container = _buildah("from", "scratch").strip()
    _buildah("add", "--quiet", container, root, "/")
    _buildah("commit", "--quiet", "--rm", container, DEBIAN)
    shutil.rmtree(root)


@functools.cache
def build(
    name: str,
    dockerfile: Path,
    context: Path,
    *,
    base: str | None = None,
    arguments: tuple[str, ...] = (),
) -> str:
    """Builds `dockerfile` over `context`; layers whose inputs did not change come from the cache.

    `base` is the image it starts from, named so that it exists before; `arguments` are `KEY=value`.
    """
    command = ["bud", "--quiet", "--layers", "--pull-never", "--isolation", "chroot"]
    command += ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]  # a proxy's certificate, if any
    for argument in arguments:
        command += ["--build-arg", argument]
    with cache.locked("images"):
        _make_room()
        _buildah(*command, "--file", dockerfile, "--tag", name, context, tries=2)
    return name


def _make_room() -> None:
    """Where the disk fills up, layers that no image has any more go."""
    if shutil.disk_usage(cache.folder()).free < ROOM:
        _buildah("rm", "--all")  # what killed builds left
        _buildah("rmi", "--prune")


def stored(name: str) -> store.Image:
    """Image `name`, which must have been built, with its unpacked layers."""
    found = store.read(store_folder(), name)
    if found is None:
        raise LookupError(f"no image {name} was built")
    return found


def identity(name: str) -> str:
    """The content's identity of image `name`, which must have been built."""
    found = _identity(name)
    if not found:
        raise LookupError(f"no image {name} was built")
    return found


def _identity(name: str) -> str:
    listed = _buildah("images", "--no-trunc", "--format", "{{.Name}}:{{.Tag}} {{.ID}}")
    ids = dict(line.split() for line in listed.splitlines())
    return ids.get(name, "")


def _buildah(*arguments: object, tries: int = 1) -> str:
    """One buildah command on the cache's own store; its mounts die with its mount namespace."""
    root = store_folder()
    where = ["--root", root, "--runroot", root / "run", "--storage-driver", "overlay"]
    command = ["unshare", "--mount", "buildah", *where, *arguments]
    return run(command, timeout=BUILD_SECONDS, tries=tries)


def store_folder() -> Path:
    """Where buildah keeps layers and images."""
    return cache.folder() / "images" / "store"
