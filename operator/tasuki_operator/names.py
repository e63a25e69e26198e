"""Names and labels of what the operator makes, in one place: builders, status and watches agree."""

from typing import Literal

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")

MANAGER = "tasuki-operator"
DEPLOYMENT = "tasuki.dev/deployment"
ROLE = "tasuki.dev/role"
REVISION = "tasuki.dev/revision"
SECRETS = "tasuki.dev/secrets"
"""Annotation of pods: changes with the secrets that they read when they start."""
HTTP_PORT = 8100
TRANSFER_PORT = 8200
NIXL_PORTS = (8210, 8273)
"""First and last of those on which NIXL's transport over TCP listens, in pods of both roles: some
for each network interface, taken at random."""
KEY_ENTRY = "key"
"""In the data of the transfer secret that the operator makes."""


POLICY_ENTRY = "policy.json"
"""In the data of the ConfigMap with what gateways allow."""


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


def gateway_policy(name: str) -> str:
    """Name of the ConfigMap with what gateways allow, which pods read again and again."""
    return f"{name}-gateway"


def engine_config(name: str, revision: str) -> str:
    """Name of the ConfigMap with the engine's settings; another revision, another map."""
    return f"{name}-engine-{revision}"
