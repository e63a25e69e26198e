"""Writes the dashboards, the rules and docs/metrics.md into the repository."""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from tasuki_monitoring import reference, rules
from tasuki_monitoring.deployment import deployment
from tasuki_monitoring.fleet import fleet
from tasuki_monitoring.hand_over import hand_over
from tasuki_monitoring.operator import operator

ROOT = Path(__file__).parents[2]
_COMPONENT = Path("manifests/components/monitoring")
_BOARDS = {
    "fleet": fleet,
    "deployment": deployment,
    "hand_over": hand_over,
    "operator": operator,
}


def files() -> dict[Path, str]:
    """What is generated, by path from the repository's root."""
    boards = {
        _COMPONENT / f"dashboards/{name}.json": json.dumps(
            make().build(), cls=JSONEncoder, indent=1, sort_keys=True
        )
        + "\n"
        for name, make in _BOARDS.items()
    }
    return {
        **boards,
        _COMPONENT / "rules.yaml": rules.page(),
        Path("docs/metrics.md"): reference.page(),
    }


def main() -> int:
    """Writes them all."""
    for path, text in files().items():
        target = ROOT / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
