"""What the Dockerfiles say beside the pins must be the pins."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_engines_image_installs_the_pinned_torch_first() -> None:
    dockerfile = (ROOT / "engine" / "Dockerfile").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    installed = re.findall(r"^ARG TORCH=(.+)$", dockerfile, re.MULTILINE)
    assert installed == re.findall(r"^torch==(.+)$", constraints, re.MULTILINE)
