"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler, as a cluster runs them."""

import json

from . import binaries
from .identities import SERVICE_ADDRESS, Identities
from .machine import ADDRESS, Machine

SERVICES = "10.96.0.0/16"
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def start_api(machine: Machine, identities: Identities) -> None:
    """Starts etcd and the API server; its audit log is logs/audit.log."""
    assert SERVICES.startswith(SERVICE_ADDRESS.rpartition(".")[0])
    data = machine.folder / "etcd"
    etcd = [binaries.path("etcd"), f"--data-dir={data}", "--unsafe-no-fsync", "--log-level=warn"]
    machine.start("etcd", etcd)
    machine.start("kube-apiserver", _apiserver(machine, identities))


def start_controllers(machine: Machine, identities: Identities) -> None:
    """Starts the controller manager and the scheduler; the API server must be ready."""
    accounts, authority = identities.path("accounts.key"), identities.path("ca.crt")
    credentials = [f"--service-account-private-key-file={accounts}", f"--root-ca-file={authority}"]
    plugins = f"--flex-volume-plugin-dir={machine.folder / 'plugins'}"
    flags: dict[str, list[str]] = {
        "controller-manager": [*credentials, plugins, "--use-service-account-credentials"],
        "scheduler": [],
    }
    for part in flags:
        config = identities.path(f"{part}.kubeconfig")
        common = [f"--kubeconfig={config}", "--leader-elect=false", "--bind-address=127.0.0.1"]
        command = [binaries.path(f"kube-{part}"), *common, *flags[part]]
        machine.start(f"kube-{part}", command)


def _apiserver(machine: Machine, identities: Identities) -> list[str]:
    """Its command: RBAC, Node authorizer, Pod Security, service-account tokens, audit."""
    policy = machine.folder / "audit-policy.json"
    policy.write_text(json.dumps(AUDIT))
    paths = {
        "tls-cert-file": "apiserver.crt",
        "tls-private-key-file": "apiserver.key",
        "client-ca-file": "ca.crt",
        "kubelet-certificate-authority": "ca.crt",
        "kubelet-client-certificate": "kubelet-client.crt",
        "kubelet-client-key": "kubelet-client.key",
        "service-account-key-file": "accounts.key",
        "service-account-signing-key-file": "accounts.key",
    }
    return [
        str(binaries.path("kube-apiserver")),
        *(f"--{flag}={identities.path(name)}" for flag, name in paths.items()),
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={ADDRESS}",
        "--secure-port=6443",
        f"--service-cluster-ip-range={SERVICES}",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--kubelet-preferred-address-types=InternalIP",
        "--feature-gates=ImageVolume=true",  # on by itself from 1.35
        f"--audit-policy-file={policy}",
        f"--audit-log-path={machine.folder / 'logs' / 'audit.log'}",
        "--audit-log-maxsize=10000",  # MB; by default it begins anew at 100, and tests count lines
    ]
