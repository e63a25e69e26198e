"""Names and labels of what the operator makes, in one place: builders, status and watches agree."""

from typing import Literal

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")

MANAGER = "tasuki-operator"
DEPLOYMENT = "tasuki.dev/deployment"
ROLE = "tasuki.dev/role"
REVISION = "tasuki.dev/revision"
TRANSFER_KEY = "tasuki.dev/transfer-key"
"""Annotation of pods: which transfer secret they were made with."""
HTTP_PORT = 8100
TRANSFER_PORT = 8200
KEY_ENTRY = "key"
"""In the data of the transfer secret that the operator makes."""


def labels(name: str, role: Role | None = None) -> dict[str, str]:
    """Labels of a child of the deployment `name`."""
    result = {
        "app.kubernetes.io/name": "tasuki",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/managed-by": MANAGER,
        "app.kubernetes.io/part-of": "tasuki",
        DEPLOYMENT: name,
    }
    if role is not None:
        result |= {"app.kubernetes.io/component": role, ROLE: role}
    return result


def selector(name: str, role: Role) -> dict[str, str]:
    """Labels by which the pods of one role are found; they can never change."""
    return {DEPLOYMENT: name, ROLE: role}


def of_role(name: str, role: Role) -> str:
    """Name of a role's Deployment, Service, PodDisruptionBudget and NetworkPolicy."""
    return f"{name}-{role}"


def transfer_secret(name: str) -> str:
    """Name of the Secret that the operator makes when none is given."""
    return f"{name}-transfer"


def engine_config(name: str, revision: str) -> str:
    """Name of the ConfigMap with the engine's settings; another revision, another map."""
    return f"{name}-engine-{revision}"
