"""Which of several operators works: a Lease, as Kubernetes' own controllers use it.

The holder renews it every `RENEW` seconds. One that could not for `GIVE_UP` seconds must stop at
once: after `DURATION` seconds another one takes over, by its own clock, for clocks differ.
"""

import asyncio
import datetime
import secrets
import socket
import time
from typing import Any

import aiohttp

from tasuki_common import logs
from tasuki_operator.api import Api, ApiError
from tasuki_operator.kinds import LEASE

log = logs.get("tasuki.operator")

DURATION, GIVE_UP, RENEW = 15.0, 10.0, 2.0
NAME = "tasuki-operator"


class LostError(Exception):
    """The lease may be another operator's by now."""


def identity() -> str:
    """A name for this process: two of one host, or one and its successor, are not the same."""
    return f"{socket.gethostname()}_{secrets.token_hex(6)}"


class Lease:
    """The claim of `holder` on the one lease in `namespace`."""

    def __init__(self, api: Api, namespace: str, holder: str) -> None:
        self._api, self._namespace, self._holder = api, namespace, holder
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = 0.0

    async def acquire(self) -> None:
        """Returns when the lease is ours; waits as long as another one renews it."""
        waiting = False
        while not await self._try():
            if not waiting:
                log.info("standing_by", holder=self._seen[0])
                waiting = True
            await asyncio.sleep(RENEW)
        log.info("leading", holder=self._holder)

    async def hold(self) -> None:
        """Renews the lease for ever.

        Raises:
            LostError: another one has it, or it could not be renewed in time.
        """
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(RENEW)
            begun = time.monotonic()
            try:
                async with asyncio.timeout(GIVE_UP - (begun - renewed)):
                    held = await self._try()
            except TimeoutError:
                raise LostError(f"no renewal for {GIVE_UP:.0f} seconds") from None
            if held:
                renewed = begun
            elif self._seen[0] != self._holder:
                raise LostError(f"{self._seen[0] or 'nobody'} holds the lease")
            elif time.monotonic() - renewed > GIVE_UP:
                raise LostError(f"no renewal for {GIVE_UP:.0f} seconds")

    async def release(self) -> None:
        """Lets the next one take over at once."""
        lease = await self._api.get(LEASE, self._namespace, NAME)
        if lease is not None and lease["spec"].get("holderIdentity") == self._holder:
            lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
            await self._api.replace(lease)

    async def _try(self) -> bool:
        """Takes or renews the lease if that is allowed; whether it is ours now."""
        try:
            lease = await self._api.get(LEASE, self._namespace, NAME)
            if lease is None:
                await self._api.create(self._claim(None))
                return True
            holder = str(lease["spec"].get("holderIdentity") or "")
            stamp = (holder, str(lease["spec"].get("renewTime")))
            if stamp != self._seen:
                self._seen, self._seen_at = stamp, time.monotonic()
            expired = time.monotonic() - self._seen_at > DURATION
            if holder not in ("", self._holder) and not expired:
                return False
            await self._api.replace(self._claim(lease))
            self._seen = (self._holder, "")
            return True
        except ApiError as error:
            if error.status != 409:  # 409: another one was quicker
                log.warning("lease_refused", status=error.status, reason=str(error))
        except (aiohttp.ClientError, OSError) as error:
            log.warning("api_server_away", reason=str(error))
        return False

    def _claim(self, lease: dict[str, Any] | None) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        claim = lease or {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": {"name": NAME, "namespace": self._namespace},
            "spec": {},
        }
        spec = claim["spec"]
        if spec.get("holderIdentity") != self._holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions", -1)) + 1
        spec |= {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": int(DURATION),
            "renewTime": now,
        }
        return claim
