"""The conversion as a script of its own."""

import subprocess
import sys


def test_it_is_the_command_of_the_package(tmp_path):
    command = [sys.executable, "-m", "tools.convert", "inspect", str(tmp_path / "missing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "missing") in done.stderr
