"""Images from buildah's store into containerd's, on one disk: layers are linked and not copied.

Both only ever read a layer that is done, so they can share its files; an image of gigabytes is
there within seconds. Layers become snapshots first, so that importing an archive without them finds
nothing left to unpack.
"""

import json
import re
from pathlib import Path

from . import images, store
from .machine import Machine

SOCKET = "/run/containerd/containerd.sock"
CTR = ("ctr", "--address", SOCKET, "--namespace", "k8s.io")
KEPT = "containerd.io/gc.root"
LINK_SECONDS = 300.0


def load(machine: Machine, name: str) -> None:
    """Makes image `name`, as it was built last, usable by pods."""
    identity = images.identity(name)
    rows = [line.split() for line in machine.run(*CTR, "images", "list").splitlines()[1:]]
    before = [row for row in rows if row[0] == name]
    if not before or identity not in before[0][-1]:
        _import(machine, images.stored(name))
    # A containerd that starts does not trust images without the layers' archives; news of one it
    # does. Hence the label also where it is there already.
    machine.run(*CTR, "images", "label", name, f"tasuki.dev/content={identity}")
    for row in rows:  # the kubelet's name for the old content
        if before and identity not in before[0][-1] and row[0] != name and row[2] == before[0][2]:
            machine.run(*CTR, "images", "delete", row[0])


def _import(machine: Machine, image: store.Image) -> None:
    listed = machine.run(*CTR, "snapshots", "list").splitlines()[1:]
    there = {line.split()[0] for line in listed if line.strip()}
    parent = ""
    for layer in image.layers:
        if layer.chain not in there:
            _link(machine, layer, parent, there)
        parent = layer.chain
    archive = machine.folder / "image.tar"
    store.write_description(image, archive)
    machine.run(*CTR, "images", "import", archive, timeout=LINK_SECONDS)
    archive.unlink()
    for layer in image.layers:  # from here on the image keeps them
        machine.run(*CTR, "snapshots", "label", layer.chain, f"{KEPT}=")


def _link(machine: Machine, layer: store.Layer, parent: str, there: set[str]) -> None:
    """A snapshot of containerd's with the layer's files."""
    unfinished = f"linking-{layer.chain}"
    if unfinished in there:
        machine.run(*CTR, "snapshots", "delete", unfinished)
    below = [parent] if parent else []
    mounts = json.loads(machine.run(*CTR, "snapshots", "prepare", "--mounts", unfinished, *below))
    target = _upper(mounts[0])
    copy = ["cp", "--archive", "--link", f"{layer.folder}/.", target]
    machine.run(*copy, timeout=LINK_SECONDS)
    machine.run(*CTR, "snapshots", "commit", layer.chain, unfinished)


def _upper(mount: dict[str, object]) -> Path:
    """The folder that takes what is written to a snapshot."""
    options = str(mount["Options"])
    found = re.search(r"upperdir=([^,' ]+)", options)
    return Path(found[1] if found else str(mount["Source"]))
