"""Settings come from flags, environment and defaults, and errors name their source."""

import dataclasses
from typing import Any, Literal

import pytest
from hypothesis import given, strategies as st

from tasuki_common import settings
from tasuki_common.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """What the tests load."""

    model: str = dataclasses.field(metadata={"help": "100% of the model."})
    port: int = 8000
    share: float = 0.9
    caching: bool = True
    role: Literal["prefill", "decode"] = "prefill"
    seeds: tuple[str, ...] = ()
    limit: int | None = None
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    api_key: str | None = dataclasses.field(default=None, metadata={"secret": True})


def load(*argv: str, **environ: str) -> Example:
    return settings.load(Example, argv, prog="tasuki example", environ=environ)


def test_defaults_hold_when_nothing_is_given() -> None:
    assert load("--model", "m") == Example(model="m")


def test_every_type_is_read_from_flags() -> None:
    loaded = load(
        *("--model", "m", "--port", "1", "--share", "0.5", "--no-caching", "--role", "decode"),
        *("--seeds", "a, b,", "--limit", "3", "--engine", '{"block_size": 16}'),
    )
    assert loaded == Example(
        model="m",
        port=1,
        share=0.5,
        caching=False,
        role="decode",
        seeds=("a", "b"),
        limit=3,
        engine={"block_size": 16},
    )


def test_the_environment_is_read_and_a_flag_wins_over_it() -> None:
    environ = {"TASUKI_MODEL": "m", "TASUKI_PORT": "1", "TASUKI_CACHING": "no", "TASUKI_LIMIT": ""}
    assert load("--port", "2", **environ) == Example(model="m", port=2, caching=False)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ((), "--model (or TASUKI_MODEL)"),
        (("--model", "m", "--port", "x"), "--port is 'x'"),
        (("--model", "m", "--role", "both"), "prefill|decode"),
        (("--model", "m", "--engine", "[1]"), "--engine"),
        (("--model", "m", "--engine", "{"), "--engine"),
        (("--model", "m", "--modle", "x"), "--modle"),
        (("--model", "m", "--mod", "x"), "--mod"),
    ],
)
def test_an_error_names_the_flag(argv: tuple[str, ...], names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    assert names in str(caught.value)


def test_an_error_names_the_environment_key() -> None:
    with pytest.raises(ConfigError, match="TASUKI_CACHING is 'maybe'; it must be BOOL"):
        load("--model", "m", TASUKI_CACHING="maybe")


def test_describe_masks_set_secrets_only() -> None:
    assert settings.describe(Example(model="m"))["api_key"] is None
    described = settings.describe(Example(model="m", api_key="s3cret"))
    assert described["api_key"] == settings.MASK
    assert described["port"] == 8000
    described = settings.describe(Example(model="redis://me:s3cret@host:1/0"))
    assert described["model"] == f"redis://{settings.MASK}@host:1/0"


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        load("--help")
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert "100% of the model. Required." in shown
    for field in dataclasses.fields(Example):
        assert "--" + field.name.replace("_", "-") in shown


@given(st.integers(), st.floats(allow_nan=False), st.text(min_size=1))
def test_values_survive_their_way_through_text(port: int, share: float, model: str) -> None:
    loaded = load(f"--model={model}", f"--port={port}", f"--share={share!r}")
    assert (loaded.port, loaded.share, loaded.model) == (port, share, model)
