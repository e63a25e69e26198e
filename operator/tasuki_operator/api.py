"""The API server, as far as the operator needs it: get, list, create, apply, delete."""

import importlib.metadata
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import kopf
import msgspec

from tasuki_common.errors import TasukiError
from tasuki_operator.kinds import BY_NAME, Kind
from tasuki_operator.metrics import Metrics
from tasuki_operator.names import MANAGER

Manifest = dict[str, Any]

_IN_CLUSTER = "https://kubernetes.default.svc"  # what kopf calls the server of its own cluster
_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_TOKEN_SECONDS = 30.0
_TIMEOUT = aiohttp.ClientTimeout(total=30.0, connect=5.0)
_PAGE = 500
_TERMINATING = "NamespaceTerminating"
_UNTYPED = "failed to create typed patch object"
"""How an apply is refused whose fields have other types than the schema's; its status is 500."""


class ApiError(TasukiError):
    """The API server refused or failed; the message is its own."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason

    @property
    def is_farewell(self) -> bool:
        """Whether nothing can be made any more where all is being deleted."""
        return self.reason == _TERMINATING

    @property
    def is_refusal(self) -> bool:
        """Whether the same request would be refused again: the object must be changed."""
        is_one = self.status in (400, 403, 422) or str(self).startswith(_UNTYPED)
        return is_one and not self.is_farewell


class Api:
    """One connection pool to the server that `info` names.

    Every method raises `ApiError` for an answer that is no success, and `aiohttp.ClientError` or
    `TimeoutError` when there is no answer.
    """

    def __init__(self, info: kopf.ConnectionInfo, metrics: Metrics) -> None:
        self._info, self._metrics = info, metrics
        tls = info.as_ssl_context() if info.server.startswith("https") else False
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=32, socket_factory=_socket),
            headers={"User-Agent": f"{MANAGER}/{importlib.metadata.version('tasuki')}"},
            timeout=_TIMEOUT,
        )
        self._token, self._token_read = "", 0.0

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        """The object; None when there is none."""
        try:
            return await self._request("GET", kind.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: Kind, namespace: str | None, labels: str = "") -> list[Manifest]:
        """All objects with these labels, in a namespace or (None) the cluster."""
        found: list[Manifest] = []
        query = {"labelSelector": labels, "limit": str(_PAGE)}
        while True:
            page = await self._request("GET", kind.path(namespace), query=query)
            found += page.get("items", [])
            following = page.get("metadata", {}).get("continue")
            if not following:
                break
            query["continue"] = following
        for item in found:  # lists leave it out
            item.setdefault("apiVersion", kind.api_version)
            item.setdefault("kind", kind.name)
        return found

    async def serves(self, kind: Kind) -> bool:
        """Whether the cluster knows the kind."""
        try:
            answer = await self._request("GET", f"/apis/{kind.api_version}")
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return any(item["name"] == kind.plural for item in answer.get("resources", []))

    async def create(self, manifest: Manifest) -> Manifest:
        """The new object, as stored."""
        kind, namespace, _ = _address(manifest)
        query = {"fieldManager": MANAGER}
        return await self._request("POST", kind.path(namespace), manifest, query=query)

    async def replace(self, manifest: Manifest) -> Manifest:
        """The object, as stored; a conflict (409) when its resourceVersion is an old one."""
        kind, namespace, name = _address(manifest)
        return await self._request("PUT", kind.path(namespace, name), manifest)

    async def apply(self, manifest: Manifest, subresource: str = "") -> Manifest:
        """Server-side apply as `MANAGER`; takes over the manifest's fields, leaves all others."""
        kind, namespace, name = _address(manifest)
        path = kind.path(namespace, name) + (f"/{subresource}" if subresource else "")
        query = {"fieldManager": MANAGER, "force": "true"}
        content = "application/apply-patch+yaml"
        return await self._request("PATCH", path, manifest, query=query, content=content)

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str) -> None:
        """Deletes the object with this uid, if it is still there."""
        options = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        try:
            await self._request("DELETE", kind.path(namespace, name), options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def _request(
        self,
        method: str,
        path: str,
        body: Manifest | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
    ) -> Manifest:
        headers = {"Accept": "application/json", **self._credentials()}
        data = None
        if body is not None:
            data, headers["Content-Type"] = msgspec.json.encode(body), content
        begun, code = time.perf_counter(), "none"
        try:
            async with self._session.request(
                method,
                self._info.server.rstrip("/") + path,
                params=query,
                data=data,
                headers=headers,
            ) as answer:
                code = str(answer.status)
                payload = await answer.read()
        finally:
            self._metrics.api_requests.labels(method, code).inc()
            self._metrics.api_seconds.labels(method).observe(time.perf_counter() - begun)
        return _read(answer.status, payload)

    def _credentials(self) -> dict[str, str]:
        """A pod's token is renewed in its file about every hour."""
        if self._info.server != _IN_CLUSTER:
            return self._info.as_http_headers()
        if time.monotonic() - self._token_read > _TOKEN_SECONDS or not self._token:
            self._token = _TOKEN.read_text("utf-8").strip()
            self._token_read = time.monotonic()
        return {"Authorization": f"Bearer {self._token}"}


def _socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """One whose end drops what it has not sent: the kernel would go on for minutes, and what a
    leader that was cut off had wanted would be written after another one leads."""
    family, kind, protocol, *_ = address
    result = socket.socket(family, kind, protocol)
    result.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return result


def _read(status: int, payload: bytes) -> Manifest:
    try:
        answer = msgspec.json.decode(payload, type=dict[str, Any])
    except msgspec.DecodeError:
        answer = {"message": payload[:200].decode("utf-8", "replace")}
    if status < 300:
        return answer
    reason = str(answer.get("reason") or status)
    causes = (answer.get("details") or {}).get("causes") or []
    if any(cause.get("reason") == _TERMINATING for cause in causes):
        reason = _TERMINATING
    raise ApiError(status, reason, str(answer.get("message") or f"status {status}"))


def _address(manifest: Manifest) -> tuple[Kind, str, str]:
    metadata = manifest["metadata"]
    return BY_NAME[manifest["kind"]], metadata["namespace"], metadata["name"]
