"""Keys, certificates and kubeconfigs of everyone in the cluster, made by openssl for one run."""

from pathlib import Path

import yaml

from .commands import run
from .machine import ADDRESS, NAME

SERVICE_ADDRESS = "10.96.0.1"
SERVER = f"https://{ADDRESS}:6443"
SERVED_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", NAME)
SUBJECTS = {  # who they are to RBAC and to the Node authorizer: /O=group/CN=user
    "apiserver": "/CN=kube-apiserver",
    "kubelet-client": "/O=system:masters/CN=kube-apiserver-kubelet-client",
    "admin": "/O=system:masters/CN=tests",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "kubelet": f"/O=system:nodes/CN=system:node:{NAME}",
    "proxy": "/CN=system:kube-proxy",
    "coredns": "/CN=coredns",
}
EXTENSIONS = """basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature,keyEncipherment
extendedKeyUsage=serverAuth,clientAuth
authorityKeyIdentifier=keyid
subjectAltName={names}
"""
SECONDS = 30.0


class Identities:
    """A folder with `ca.crt`, and for each subject NAME.crt, NAME.key and NAME.kubeconfig."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)
        names = [f"DNS:{name}" for name in SERVED_NAMES]
        names += [f"IP:{address}" for address in (ADDRESS, SERVICE_ADDRESS, "127.0.0.1")]
        (folder / "extensions").write_text(EXTENSIONS.format(names=",".join(names)))
        self._make_authority()
        for name, subject in SUBJECTS.items():
            self._certify(name, subject)
            self._write_kubeconfig(name)
        key = ["openssl", "genrsa", "-out", self.path("accounts.key"), "2048"]
        run(key, timeout=SECONDS)

    def path(self, name: str) -> Path:
        """A file in the folder."""
        return self._folder / name

    def _make_authority(self) -> None:
        days, subject = ["-days", "2"], ["-subj", "/CN=tasuki tests"]
        usage = ["-addext", "keyUsage=critical,keyCertSign,digitalSignature"]
        files = ["-keyout", self.path("ca.key"), "-out", self.path("ca.crt")]
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command = ["openssl", "req", "-x509", *curve, *days, *subject, *usage, *files]
        run(command, timeout=SECONDS)

    def _certify(self, name: str, subject: str) -> None:
        request, key = self.path(f"{name}.csr"), self.path(f"{name}.key")
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command = ["openssl", "req", *curve, "-subj", subject, "-keyout", key, "-out", request]
        run(command, timeout=SECONDS)
        authority = ["-CA", self.path("ca.crt"), "-CAkey", self.path("ca.key"), "-CAcreateserial"]
        extensions = ["-extfile", self.path("extensions"), "-days", "2"]
        sign = ["openssl", "x509", "-req", "-in", request, *authority, *extensions]
        run([*sign, "-out", self.path(f"{name}.crt")], timeout=SECONDS)

    def _write_kubeconfig(self, name: str) -> None:
        cluster = {"server": SERVER, "certificate-authority": str(self.path("ca.crt"))}
        certificate, key = str(self.path(f"{name}.crt")), str(self.path(f"{name}.key"))
        user = {"client-certificate": certificate, "client-key": key}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": NAME, "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": NAME, "context": {"cluster": NAME, "user": name}}],
            "current-context": NAME,
        }
        self.path(f"{name}.kubeconfig").write_text(yaml.safe_dump(config))
