"""The policy that the pod announces, from a file that may change while it runs.

In a cluster the file is a ConfigMap's: a model is exposed or limited, and its keys change, without
a pod that starts anew.
"""

import os
from pathlib import Path

import msgspec

from tasuki_common import logs
from tasuki_common.errors import ConfigError
from tasuki_common.policy import Policy

log = logs.get("tasuki.pod")


class PolicyFile:
    """The policy in `path` (JSON, fields of `Policy`); the default one without a path.

    Raises:
        ConfigError: the file cannot be read. Later, the last one that could be read holds.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._stamp = self._look()
        self._policy = self._read()

    def current(self) -> Policy:
        """As the file says now."""
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._policy = self._read()
                log.info("policy_changed", path=str(self._path))
        except ConfigError as error:
            log.warning("policy_unreadable", reason=str(error))
        return self._policy

    def _look(self) -> tuple[int, int]:
        """Changes with the file: it is written anew, or another one takes its place."""
        if self._path is None:
            return 0, 0
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise self._unreadable(error.strerror) from error
        return found.st_ino, found.st_mtime_ns

    def _read(self) -> Policy:
        if self._path is None:
            return Policy()
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Policy)
        except OSError as error:
            raise self._unreadable(error.strerror) from error
        except msgspec.MsgspecError as error:
            raise self._unreadable(str(error)) from error

    def _unreadable(self, why: str | None) -> ConfigError:
        return ConfigError(f"policy_file is {str(self._path)!r}, which cannot be read: {why}.")
