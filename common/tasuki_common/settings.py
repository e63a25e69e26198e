"""Settings of a process: one dataclass, filled from flags, environment and defaults.

A field `redis_url` is the flag `--redis-url` and the environment key `TASUKI_REDIS_URL`; the flag
wins over the environment, the environment over the default. A value that cannot be read is an error
that names where it came from; nothing falls back silently.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        model: str = dataclasses.field(metadata={"help": "Folder or id of the model."})
        port: int = dataclasses.field(default=8000, metadata={"help": "0: a free one."})
        api_key: str | None = dataclasses.field(default=None, metadata={"secret": True})

Field types: str, int, float, bool, Literal of strings, tuple[str, ...] (comma list), dict (a JSON
object), and any of them `| None` (an empty value is None). A field with `positional` metadata is
given without its flag's name.
"""

import argparse
import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from tasuki_common.errors import ConfigError

T = TypeVar("T")

ENV_PREFIX = "TASUKI_"
MASK = "***"
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")

_BOOLS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def load(
    cls: type[T], argv: Sequence[str], *, prog: str, environ: Mapping[str, str] | None = None
) -> T:
    """An instance of the dataclass `cls`; `environ` defaults to the process's.

    Raises:
        ConfigError: an unknown flag, a missing or unreadable value, or one that `cls` refuses.
        SystemExit: after `--help` was printed.
    """
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    given = vars(_parser(cls, hints, prog).parse_args(argv))
    values: dict[str, Any] = {}
    for field in _fields(cls):
        env_key = ENV_PREFIX + field.name.upper()
        if field.name in given:
            values[field.name] = _read(given[field.name], hints[field.name], _name(field))
        elif env_key in environ:
            values[field.name] = _read(environ[env_key], hints[field.name], env_key)
        elif _required(field):
            raise ConfigError(f"{prog} needs {_name(field)} (or {env_key}).")
    return cls(**values)


def describe(settings: object) -> dict[str, Any]:
    """All fields by name, for printing at start; secrets and passwords in URLs are masked."""
    return {
        field.name: MASK if field.metadata.get("secret") and value is not None else _masked(value)
        for field in _fields(type(settings))
        for value in [getattr(settings, field.name)]
    }


def _masked(value: Any) -> Any:
    return _USER_INFO.sub(f"{MASK}@", value) if isinstance(value, str) else value


class _Parser(argparse.ArgumentParser):
    """argparse that raises what the caller can print, in place of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}. See {self.prog} --help.")


def _parser(cls: type, hints: dict[str, Any], prog: str) -> argparse.ArgumentParser:
    doc = (cls.__doc__ or "").split("\n\n")[0]
    parser = _Parser(
        prog=prog, description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for field in _fields(cls):
        text = _help(field).replace("%", "%%")
        if _strip_none(hints[field.name])[0] is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(_name(field), dest=field.name, action=action, help=text)
        elif field.metadata.get("positional"):
            parser.add_argument(field.name, metavar=_name(field), nargs="?", help=text)
        else:
            metavar = _metavar(hints[field.name])
            parser.add_argument(_name(field), dest=field.name, metavar=metavar, help=text)
    return parser


def _fields(cls: type) -> list["dataclasses.Field[Any]"]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _name(field: "dataclasses.Field[Any]") -> str:
    """The flag of a field, or what stands for a positional one."""
    if field.metadata.get("positional"):
        return field.name.upper()
    return "--" + field.name.replace("_", "-")


def _required(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _help(field: "dataclasses.Field[Any]") -> str:
    text = str(field.metadata.get("help", ""))
    if _required(field):
        return f"{text} Required."
    if field.default in (dataclasses.MISSING, None, ()):
        return text
    return f"{text} Default: {field.default}."


def _strip_none(hint: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether None was allowed."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    inner = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    return inner[0], len(inner) < len(typing.get_args(hint))


def _metavar(hint: Any) -> str:
    hint, _ = _strip_none(hint)
    match typing.get_origin(hint) or hint:
        case typing.Literal:
            return "|".join(typing.get_args(hint))
        case builtin if builtin is tuple:
            return "A,B"
        case builtin if builtin is dict:
            return "JSON"
        case builtin:
            return str(builtin.__name__).upper()


def _read(value: object, hint: Any, source: str) -> Any:
    """The typed value of what stood at `source`."""
    hint, optional = _strip_none(hint)
    if not isinstance(value, str):  # a boolean flag, already read by argparse
        return value
    if optional and value == "":
        return None
    try:
        return _convert(value, hint)
    except (ValueError, KeyError) as error:
        expected = _metavar(hint)
        raise ConfigError(f"{source} is {value!r}; it must be {expected}.") from error


def _convert(value: str, hint: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    if origin is bool:
        return _BOOLS[value.strip().lower()]
    if origin is tuple:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if origin is dict:
        decoded = json.loads(value)
        if not isinstance(decoded, dict):
            raise ValueError("not a JSON object")
        return decoded
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError("not one of the choices")
        return value
    return hint(value)
