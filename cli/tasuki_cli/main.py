"""The `tasuki` command: a verb and its flags. Each verb imports only what it needs.

Exit status: 0 done, 1 failed, 2 the command or the configuration must be changed.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from tasuki_common.errors import ConfigError

_VERBS = {
    "up": ("tasuki_cli.up", "run an InferenceDeployment file on this machine"),
    "ask": ("tasuki_cli.ask", "stream one answer from an endpoint"),
    "gateway": ("tasuki_gateway.main", "serve the OpenAI endpoint"),
    "prefill": ("tasuki_prefill.main", "serve a pod that computes prompts"),
    "decode": ("tasuki_decode.main", "serve a pod that generates tokens"),
    "operator": ("tasuki_operator.main", "serve InferenceDeployments in a Kubernetes cluster"),
}

_EXTRAS = {"up": "local", "ask": "gateway", "gateway": "gateway", "operator": "operator"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns its exit status."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["help"]
    if verb in ("version", "--version"):
        sys.stdout.write(f"tasuki {importlib.metadata.version('tasuki')}\n")
        return 0
    if verb in ("help", "--help", "-h"):
        sys.stdout.write(_usage())
        return 0
    if verb not in _VERBS:
        sys.stderr.write(f"tasuki has no verb {verb!r}.\n\n{_usage()}")
        return 2
    try:
        return int(importlib.import_module(_VERBS[verb][0]).main(rest))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tasuki"):
            raise
        extra = _EXTRAS.get(verb, "engine")
        sys.stderr.write(f"tasuki {verb} needs {error.name}: install tasuki[{extra}].\n")
        return 2


def _usage() -> str:
    verbs = [(name, text) for name, (_, text) in _VERBS.items()]
    rows = "".join(f"  {name:<9}{text}\n" for name, text in [*verbs, ("version", "print it")])
    return f"usage: tasuki VERB [flags]\n\n{rows}\n`tasuki VERB --help` shows a verb's flags.\n"
