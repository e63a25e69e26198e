"""The repository's own rules."""

import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [
    Path(package) for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
]
BIN = Path(sys.executable).parent


def tracked() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listing.stdout.splitlines()


def test_component_folders_and_tests_are_no_packages() -> None:
    components = {package.parent.as_posix() for package in PACKAGES}
    for name in tracked():
        path = Path(name)
        if path.name == "__init__.py":
            assert path.parent.as_posix() not in components, name
            assert path.parts[0] != "tests", name


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_every_package_is_typed_and_checked(package: Path) -> None:
    assert (ROOT / package / "__init__.py").is_file()
    assert (ROOT / package / "py.typed").is_file()
    assert package.parts[0] in PROJECT["tool"]["mypy"]["files"]
    assert package.name in PROJECT["tool"]["importlinter"]["root_packages"]


def test_imports_go_down_only() -> None:
    linted = subprocess.run([BIN / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_the_changelog_knows_this_version() -> None:
    version = PROJECT["project"]["version"]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_names_verbs_and_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    helped = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, check=True)
    verbs = re.findall(r"^(\w+)", helped.stdout, re.MULTILINE)
    for verb in re.findall(r"\./dev (\w+)", readme):
        assert verb in verbs
    for target in re.findall(r"\]\(([^):]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^):#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_examples_of_hypothesis_may_take_as_long_as_a_busy_machine_needs() -> None:
    assert settings.default is not None
    assert settings.default.deadline is None


def test_every_pin_is_one_version_without_a_host() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", pin) for pin in pins)


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    extras = PROJECT["project"]["optional-dependencies"]
    groups = [PROJECT["project"]["dependencies"], PROJECT["dependency-groups"]["dev"]]
    groups += [extras[name] for name in extras if name != "operator"]
    for requirement in itertools.chain(*groups):
        name = re.split(r"[\[<>= ;]", requirement)[0].lower()
        assert name == "tasuki" or f"\n{name}==" in pins, name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_with_the_gateway_extra_runs_the_gateway_without_torch(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("tasuki-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "-c", constraints, f"{wheel}[gateway]")
    assert "--redis-url" in run(tmp_path / "venv" / "bin" / "tasuki", "gateway", "--help")
    installed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    assert not {"torch", "numpy", "transformers"} & {package["name"] for package in installed}
