"""An InferenceDeployment file is read whole, or refused in sentences with line and field."""

import contextlib
import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

from tasuki_common.errors import ConfigError
from tasuki_engine.config import EngineConfig
from tasuki_operator import files, schema, schema_base

MINIMAL = """\
apiVersion: tasuki.dev/v1alpha1
kind: InferenceDeployment
metadata: {name: granite}
spec:
  model: {source: "hf://ibm-granite/granite-4.0-h-micro"}
"""


def parse(text: str) -> schema.InferenceDeployment:
    return files.parse(text.encode(), "x.yaml")


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_the_minimal_file_gets_a_default_everywhere() -> None:
    deployment = parse(MINIMAL)
    assert deployment.served_name == "granite"
    assert deployment.spec.prefill.replicas == 1
    assert deployment.spec.decode.replicas == 1
    assert deployment.spec.transfer.backends is None


def test_engine_fields_and_defaults_are_the_engines() -> None:
    engine = {field.name: field for field in dataclasses.fields(EngineConfig)}
    for name, field in schema.EngineSpec.model_fields.items():
        if name == "extra":
            continue
        assert field.default == engine[name].default, name
        assert field.description, name
    settings = parse(MINIMAL).spec.engine.settings()
    assert EngineConfig(model="m", **settings) == EngineConfig(model="m")


def test_every_field_of_the_spec_is_described() -> None:
    def walk(model: type[schema_base.Model]) -> None:
        assert model.__doc__
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, schema_base.Model):
                walk(kind)
            else:
                assert field.description, f"{model.__name__}.{name}"

    walk(schema.Spec)


@pytest.mark.parametrize(
    ("line", "field", "more"),
    [
        ("  modell: {}", "6: spec.modell", "Did you mean model?"),
        ("  engine:\n    blockSize: 24", "6: spec.engine", "power of two"),
        ("  engine:\n    blockSize: '16'", "7: spec.engine.blockSize", "must be a valid integer"),
        ("  engine:\n    block_size: 16", "7: spec.engine.block_size", "Did you mean blockSize?"),
        ("  engine: {checkpointInterval: 100}", "6: spec.engine", "multiple of blockSize"),
        ("  engine: {dtype: fp8}", "6: spec.engine.dtype", "'bfloat16'"),
        ("  prefill: 2", "6: spec.prefill", "mapping"),
        ("  engine: {blockSize: 2048}", "6: spec.engine.blockSize", "less than or equal to 1024"),
        ("  rollout: {maxSurge: 0}", "6: spec.rollout", "cannot both be 0"),
        ("  decode: {env: [{name: TASUKI_PORT, value: '1'}]}", "6: spec.decode.env.0", "TASUKI_"),
        ("  decode: {replicas: 0}", "6: spec.decode.replicas", "greater than or equal to 1"),
        ("  transfer:\n    backends:\n    - rdma", "8: spec.transfer.backends.0", "'rdma'"),
        ("  prefill: {}\n  prefill: {}", "7: prefill", "twice"),
        ("  x: [", "7", "not YAML"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_field(line: str, field: str, more: str) -> None:
    told = refusal(MINIMAL + line + "\n")
    assert told.startswith(f"x.yaml:{field}: ")
    assert more in told


@pytest.mark.parametrize(
    "source", ["granite", "s3://x/y", "hf://granite", "file://", "file://models", "hf://a/b/c"]
)
def test_a_source_that_nobody_can_serve_is_refused(source: str) -> None:
    assert "spec.model.source" in refusal(
        MINIMAL.replace("hf://ibm-granite/granite-4.0-h-micro", source)
    )


def test_all_mistakes_are_told_at_once() -> None:
    told = refusal(MINIMAL + "  prefil: {}\n  decode: {replicas: x}\n").splitlines()
    assert len(told) == 2


def test_a_relative_folder_is_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    spec = schema.ModelSpec(source="file://./models")
    assert spec.local(tmp_path) == str(tmp_path / "models")
    assert schema.ModelSpec(source=f"file://{tmp_path}/models").local(Path("/")) == spec.local(
        tmp_path
    )
    assert schema.ModelSpec(source="hf://a/b").local(tmp_path) == "a/b"


def test_what_needs_a_cluster_or_is_not_there_is_refused_on_one_machine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a cluster"):
        schema.ModelSpec(source="pvc://claim/folder").local(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        schema.ModelSpec(source="file://./none").local(tmp_path)


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        files.load(tmp_path / "none.yaml")


_KEYS = st.sampled_from(["spec", "model", "engine", "metadata", "blockSize", "source", "x", "1"])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES)
def test_a_document_of_any_shape_is_served_or_refused_never_a_crash(document: object) -> None:
    with pytest.raises(ConfigError):
        parse(yaml.safe_dump(document))


@given(st.binary(max_size=200) | st.text(alphabet="abc:-?[]{}&*!|>'\"#%@` \n\t\0").map(str.encode))
def test_bytes_of_any_kind_are_refused_in_a_sentence(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        files.parse(data, "x.yaml")


@given(
    st.integers(min_value=0, max_value=len(MINIMAL)),
    st.integers(min_value=0, max_value=len(MINIMAL)),
    st.text(max_size=6),
)
def test_a_damaged_file_is_served_or_refused_never_a_crash(start: int, end: int, put: str) -> None:
    with contextlib.suppress(ConfigError):
        parse(MINIMAL[:start] + put + MINIMAL[end:])


def test_the_types_of_engine_choices_are_the_engines() -> None:
    hints = typing.get_type_hints(EngineConfig)
    for name in ("dtype", "state_dtype", "hash_algorithm"):
        field = schema.EngineSpec.model_fields[name]
        assert set(typing.get_args(field.annotation)) == set(typing.get_args(hints[name])), name
