"""The policy file of a pod: what is announced follows it, and a broken one changes nothing."""

import json
import os
from pathlib import Path

import pytest

from tasuki_common.errors import ConfigError
from tasuki_common.policy import Policy
from tasuki_pod.policy import PolicyFile


def projected(folder: Path, number: int, text: str) -> Path:
    """A file as the kubelet writes a ConfigMap's: behind a link that is exchanged as one."""
    version = folder / f"..{number}"
    version.mkdir(parents=True)
    (version / "policy.json").write_text(text)
    new = folder / "..new"
    new.symlink_to(version.name)
    os.replace(new, folder / "..data")
    path = folder / "policy.json"
    if not path.is_symlink():
        path.symlink_to("..data/policy.json")
    return path


def test_what_is_announced_follows_the_file(tmp_path: Path) -> None:
    path = projected(tmp_path, 1, json.dumps({"max_requests": 3}))
    file = PolicyFile(str(path))
    assert file.current() == Policy(max_requests=3)
    projected(tmp_path, 2, json.dumps({"exposed": False, "key_digests": ["a"]}))
    assert file.current() == Policy(exposed=False, key_digests=("a",))


@pytest.mark.parametrize("text", ["", "{", '{"exposed": 1}', '{"barrier": true}', "[]"])
def test_a_pod_does_not_start_on_a_policy_it_cannot_read_and_keeps_the_last_good_one(
    tmp_path: Path, text: str
) -> None:
    path = projected(tmp_path, 1, '{"exposed": false}')
    file = PolicyFile(str(path))
    projected(tmp_path, 2, text)
    with pytest.raises(ConfigError, match="policy_file"):
        PolicyFile(str(path))
    assert file.current() == Policy(exposed=False)
    projected(tmp_path, 3, '{"max_requests": 1}')
    assert file.current() == Policy(max_requests=1)


def test_a_file_that_goes_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"exposed": false}')
    file = PolicyFile(str(path))
    path.unlink()
    assert file.current() == Policy(exposed=False)
    with pytest.raises(ConfigError, match="cannot be read"):
        PolicyFile(str(path))


def test_without_a_file_everything_is_allowed() -> None:
    assert PolicyFile("").current() == Policy()
