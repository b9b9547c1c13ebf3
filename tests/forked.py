"""Processes with torch, megatron-core and this package imported: forked from one that has them, not started anew.

Imports take most of the time of a small run. What is tested about processes themselves (signals, launchers, ranks)
starts them as a user does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_opd.cli import main

IMPORTED = ["megatron_opd.train", "hypothesis", "pytest"]


def forking() -> ForkServerContext:
    """`multiprocessing` with processes that are forked from the one with the imports; it starts with the first."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # also: a library with threads of its own cannot be forked
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return multiprocessing.get_context("forkserver")


def run_forked(
    *arguments: object, program: Callable[[list[str]], None] = main, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """`program` with these arguments in a forked process: exit code, stdout and stderr."""
    words = [str(argument) for argument in arguments]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = forking().Process(target=_run, args=(program, words, files))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise TimeoutError(f"{words} did not end in {timeout:g} s")
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))


def _run(program: Callable[[list[str]], None], words: list[str], files: list[Path]) -> None:
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        stream.flush()
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), stream.fileno())
    program(words)
