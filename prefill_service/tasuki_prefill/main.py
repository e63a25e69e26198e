"""`tasuki prefill`: a pod that computes prompts and offers their state."""

from collections.abc import Sequence

from tasuki_pod import serve
from tasuki_prefill.app import routes


def main(argv: Sequence[str]) -> int:
    """Serves until it is told to leave; the exit status."""
    return serve.main("prefill", argv, routes)
