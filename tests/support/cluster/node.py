"""The node: containerd with bridge CNI, kubelet, kube-proxy and CoreDNS."""

import json
from pathlib import Path

from . import binaries, images
from .identities import Identities
from .loading import CTR, SOCKET
from .machine import ADDRESS, NAME, Machine

PODS = "10.244.0.0/16"
PLUGINS = Path("/usr/lib/cni")
# A test machine may lack CAP_SYS_RESOURCE: sandboxes then cannot lower their oom_score_adj.
CONTAINERD = """version = 2
root = "{root}"
state = "/run/containerd"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{network}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
NETWORK = {
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "pods0",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": PODS}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
COREFILE = """.:53 {{
    bind {address}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig}
        ttl 1
    }}
}}
"""


def start_containerd(machine: Machine) -> None:
    """Starts containerd on the machine's image store, which stays when the machine ends."""
    network = machine.folder / "cni"
    network.mkdir()
    (network / "pods.conflist").write_text(json.dumps(NETWORK))
    config = machine.folder / "containerd.toml"
    values = {"root": machine.store, "socket": SOCKET, "sandbox": images.BUSYBOX}
    config.write_text(CONTAINERD.format(plugins=PLUGINS, network=network, **values))
    machine.start("containerd", ["containerd", "--config", config])


def start(machine: Machine, identities: Identities) -> None:
    """Starts what makes this machine a node; the API server and containerd must be up."""
    config = machine.folder / "kubelet.json"
    config.write_text(json.dumps(_kubelet(machine, identities)))
    kubelet = [binaries.path("kubelet"), f"--config={config}", f"--node-ip={ADDRESS}"]
    kubelet += [f"--kubeconfig={identities.path('kubelet.kubeconfig')}"]
    machine.start("kubelet", [*kubelet, f"--hostname-override={NAME}"])
    proxy = machine.folder / "proxy.json"
    proxy.write_text(json.dumps(_proxy(identities.path("proxy.kubeconfig"))))
    machine.start("kube-proxy", [binaries.path("kube-proxy"), f"--config={proxy}"])
    corefile = machine.folder / "Corefile"
    kubeconfig = identities.path("coredns.kubeconfig")
    corefile.write_text(COREFILE.format(address=ADDRESS, kubeconfig=kubeconfig))
    machine.start("coredns", [binaries.path("coredns"), "-conf", corefile])


def _kubelet(machine: Machine, identities: Identities) -> dict[str, object]:
    """KubeletConfiguration: pods' cgroups below the machine's own, nothing evicted early."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(identities.path("ca.crt"))},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(identities.path("kubelet.crt")),
        "tlsPrivateKeyFile": str(identities.path("kubelet.key")),
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": machine.cgroup,
        "failSwapOn": False,
        "failCgroupV1": False,
        "clusterDNS": [ADDRESS],
        "clusterDomain": "cluster.local",
        "serializeImagePulls": False,
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%"},
        "maxPods": 250,
        "syncFrequency": "10s",
        "volumePluginDir": str(machine.folder / "plugins"),
    }


def _proxy(kubeconfig: Path) -> dict[str, object]:
    """KubeProxyConfiguration: iptables, and no settings of the whole kernel."""
    untouched = {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": PODS,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "conntrack": untouched,
        "hostnameOverride": NAME,
    }


def forget_containers(machine: Machine) -> None:
    """Removes what containers of an earlier run left in containerd's store; images stay."""
    for container in machine.run(*CTR, "containers", "list", "--quiet").split():
        machine.run(*CTR, "containers", "delete", container)
