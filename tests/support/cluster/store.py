"""Images as buildah's store on this disk holds them: what containers-storage writes down."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

LAYOUT = b'{"imageLayoutVersion": "1.0.0"}'


class Layer(NamedTuple):
    """A layer that is unpacked already."""

    chain: str
    """containerd's name for it on top of those below it."""
    folder: Path
    """What it holds, as an overlay's lower folder: nobody writes to it."""


class Image(NamedTuple):
    """One image."""

    name: str
    manifest: bytes
    config: bytes
    layers: list[Layer]
    """Lowest first."""


def read(store: Path, name: str) -> Image | None:
    """The image of that name, or None.

    `store` is buildah's --root with overlay layers, of which nothing is compressed.
    """
    listed = json.loads((store / "overlay-images" / "images.json").read_bytes())
    found = [image for image in listed if name in (image.get("names") or ())]
    if not found:
        return None
    folder = store / "overlay-images" / found[0]["id"]
    manifest = (folder / "manifest").read_bytes()
    key = base64.b64encode(f"sha256:{found[0]['id']}".encode()).decode()
    layers = json.loads((store / "overlay-layers" / "layers.json").read_bytes())
    below = {layer["id"]: layer for layer in layers}
    chain: list[dict[str, str]] = []
    top = found[0]["layer"]
    while top:
        chain.insert(0, below[top])
        top = below[top].get("parent", "")
    names = _chained([layer["diff-digest"] for layer in chain])
    folders = [store / "overlay" / layer["id"] / "diff" for layer in chain]
    return Image(
        name, manifest, (folder / f"={key}").read_bytes(), list(map(Layer, names, folders))
    )


def write_description(image: Image, path: Path) -> None:
    """An OCI archive of manifest and configuration, without the layers they name."""
    digest = hashlib.sha256(image.manifest).hexdigest()
    entry = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": f"sha256:{digest}",
        "size": len(image.manifest),
        "annotations": {"io.containerd.image.name": image.name},
    }
    files = {
        "oci-layout": LAYOUT,
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        f"blobs/sha256/{digest}": image.manifest,
        f"blobs/sha256/{hashlib.sha256(image.config).hexdigest()}": image.config,
    }
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def _chained(digests: list[str]) -> list[str]:
    """The OCI chain ids: of each layer together with all below it."""
    chain = digests[:1]
    for digest in digests[1:]:
        chain.append("sha256:" + hashlib.sha256(f"{chain[-1]} {digest}".encode()).hexdigest())
    return chain
