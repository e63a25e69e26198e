"""Images without a registry: Debian stands in for public bases, buildah builds the Dockerfiles."""

import functools
import shutil
import tomllib
from pathlib import Path

from . import cache
from .commands import run

REPOSITORY = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent / "images"
MIRROR = "http://deb.debian.org/debian"
DEBIAN = "docker.io/library/debian:bookworm-slim"
PYTHON = "docker.io/library/python:3.11-slim-bookworm"
REDIS = "docker.io/library/redis:7.0-bookworm"
BUSYBOX = "docker.io/tasuki/busybox:1"
BUILD_SECONDS = 1500.0


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
    shutil.copy2(shutil.which("busybox") or "/bin/busybox", context / "busybox")
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
    shutil.rmtree(root, ignore_errors=True)
    include = "--include=ca-certificates"
    command = ["debootstrap", "--variant=minbase", include, "bookworm", root, MIRROR]
    run(command, timeout=BUILD_SECONDS)
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
        _buildah(*command, "--file", dockerfile, "--tag", name, context)
    return name


def archive(name: str, path: Path) -> None:
    """Writes image `name` to `path` as an OCI archive with plain layers."""
    reference = f"oci-archive:{path}:{name}"
    _buildah("push", "--quiet", "--disable-compression", name, reference)


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


def _buildah(*arguments: object) -> str:
    """One buildah command on the cache's own store; its mounts die with its mount namespace."""
    store = cache.folder() / "images" / "store"
    where = ["--root", store, "--runroot", store / "run", "--storage-driver", "overlay"]
    command = ["unshare", "--mount", "buildah", *where, *arguments]
    return run(command, timeout=BUILD_SECONDS)
