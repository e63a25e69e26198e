"""`tasuki decode`: a pod that takes over state and streams tokens."""

from collections.abc import Sequence

from tasuki_decode.app import routes
from tasuki_pod import serve


def main(argv: Sequence[str]) -> int:
    """Serves until it is told to leave; the exit status."""
    return serve.main("decode", argv, routes)
