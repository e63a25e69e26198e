"""Reading an InferenceDeployment file: every mistake is a sentence with its line and field.

granite.yaml:7: spec.engine.blockSize: must be a power of two.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from tasuki_common.errors import ConfigError
from tasuki_operator.schema import InferenceDeployment

MAX_BYTES = 1 << 20

_Location = tuple[int | str, ...]
_SHOULD = re.compile(r"^\w+ should")


def load(path: Path) -> InferenceDeployment:
    """The deployment that the file describes.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or does not fit the schema; one line a
            mistake, each with the file, the line and the field.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes.")
    return parse(data, str(path))


def parse(data: bytes, name: str) -> InferenceDeployment:
    """The deployment in `data`; `name` stands for it in errors, which are those of `load`."""
    root, document = _document(data, name)
    try:
        return InferenceDeployment.model_validate(document)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        lines = [_sentence(name, root, problem) for problem in problems]
        raise ConfigError("\n".join(lines)) from error


def _document(data: bytes, name: str) -> tuple[yaml.Node, Any]:
    """The one YAML document of `data`, as nodes (which know their lines) and as values."""
    try:
        nodes = list(yaml.compose_all(data, Loader=yaml.SafeLoader))
        if len(nodes) != 1:
            raise ConfigError(f"{name}: holds {len(nodes)} YAML documents; it must hold one.")
        for key in _repeated_keys(nodes[0]):
            line = key.start_mark.line + 1
            raise ConfigError(f"{name}:{line}: {key.value}: is given twice; keep one.")
        return nodes[0], yaml.safe_load(data)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: is not YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: is not YAML: {str(error).splitlines()[0]}.") from error


def _repeated_keys(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Keys that stand twice in one mapping; YAML would silently keep the last."""
    done: set[int] = set()
    todo = [node]
    while todo:
        node = todo.pop()
        if id(node) in done:
            continue
        done.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                todo += (key, value)
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        yield key
                    seen.add(key.value)


def _sentence(name: str, root: yaml.Node, problem: Any) -> str:
    location: _Location = problem["loc"]
    where = f"{name}:{_line(root, location)}"
    field = ".".join(str(part) for part in location) or "the document"
    return f"{where}: {field}: {_explain(problem, location)}"


def _explain(problem: Any, location: _Location) -> str:
    message: str = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "extra_forbidden":
            known = _fields_at(location[:-1])
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(known)}."
            return f"is not a field. {hint}"
        case "missing":
            return "is missing."
        case "model_type":
            return "must be a mapping of fields."
        case _:
            given = problem["input"]
            shown = f" (it is {given!r})" if isinstance(given, str | int | float) else ""
            rule = _SHOULD.sub("must", message)
            return f"{rule}{shown}."


def _fields_at(location: Sequence[int | str]) -> list[str]:
    """Names that the schema knows in the mapping at `location`."""
    model: type[pydantic.BaseModel] = InferenceDeployment
    for part in location:
        for field in model.model_fields.values():
            if field.alias == part and isinstance(field.annotation, type):
                model = field.annotation
    return [field.alias or "" for field in model.model_fields.values()]


def _line(root: yaml.Node, location: _Location) -> int:
    """Line of the deepest node on the way to `location`, from 1."""
    node, line = root, root.start_mark.line
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
    return int(line) + 1
