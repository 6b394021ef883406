"""The conda environment, the constraints and pyproject agree."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = {
    requirement.name.lower().replace("_", "-"): next(iter(requirement.specifier)).version
    for requirement in map(
        Requirement,
        (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")),
    )
}
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
CONDA_PINS = dict(re.match(r"([\w.-]+)(.*)", entry).groups() for entry in CONDA if isinstance(entry, str))
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=lambda r: r.name)
def test_each_dependency_is_constrained_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(CONSTRAINTS[requirement.name.lower().replace("_", "-")])


def test_conda_python_is_one_that_the_project_supports() -> None:
    version = CONDA_PINS["python"].removeprefix("=")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)


def test_conda_pins_equal_the_bounds_of_pyproject() -> None:
    bounds = {requirement.name: str(requirement.specifier) for requirement in DEPENDENCIES}
    shared = CONDA_PINS.keys() & bounds.keys()
    assert shared == {"ninja"}
    assert all(CONDA_PINS[name] == bounds[name] for name in shared)


def test_conda_compiles_for_the_cuda_version_of_torch() -> None:
    assert CONDA_PINS["cuda-nvcc"] == CONDA_PINS["cuda-cudart-dev"]
    assert torch.version.cuda in (None, CONDA_PINS["cuda-nvcc"].removeprefix("="))


def test_conda_installs_the_package_under_the_constraints() -> None:
    (pip,) = (entry["pip"] for entry in CONDA if isinstance(entry, dict))
    assert pip[0] == "-c constraints.txt"
    extras = set(Requirement(pip[1].removeprefix("-e ").replace(".", "internimage", 1)).extras)
    assert extras <= PROJECT["optional-dependencies"].keys()


def test_the_constraints_hold_no_address() -> None:
    assert not re.search(r"://|@", (ROOT / "constraints.txt").read_text())
