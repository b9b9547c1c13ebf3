"""One real SGLang server for all tests of a session, with tiny models to serve."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from megatron_opd.rollout.server_start import ServerSettings
from megatron_opd.rollout.servers import Servers
from megatron_opd.rollout.sglang import SGLangEngine
from tests.data.tiny_tokenizer import save_tokenizer
from tests.tiny import VOCAB, save_tiny_model

PYTHON = Path(__file__).parent.parent / ".venv-sglang" / "bin" / "python"
LONGEST = 96  # tokens of a prompt with its response
SEEDED = ("--enable-deterministic-inference", "--disable-overlap-schedule")


def sglang_python() -> Path:
    """The interpreter that has SGLang; skips the test where there is none.

    A machine with a GPU has an SGLang of its own, which MEGATRON_OPD_SGLANG names.
    """
    named = os.environ.get("MEGATRON_OPD_SGLANG")
    python = Path(named) if named else PYTHON
    if not python.exists():
        pytest.skip(
            "no SGLang: run `make .venv-sglang/.installed`, or name its interpreter in MEGATRON_OPD_SGLANG"
        )
    return python


def tiny_settings(python: Path, *, start_timeout: float, count: int = 1) -> ServerSettings:
    """How servers of tiny models are started: float32, honouring seeds."""
    return ServerSettings(
        python=python,
        count=count,
        dtype="float32",
        longest=LONGEST,
        concurrency=16,
        start_timeout=start_timeout,
        arguments=SEEDED if not torch.cuda.is_available() else SEEDED[:1],
    )


@dataclass
class SGLangServer:
    """A running server. `models` are its Hugging Face folders, of one architecture; it starts with the first."""

    servers: Servers
    models: list[Path]
    said: list[str]

    @property
    def url(self) -> str:
        return self.servers.urls[0]

    def load(self, model: Path, version: str) -> None:
        """Give the server these weights."""
        body = {"model_path": str(model), "weight_version": version, "flush_cache": False}
        with self.engine() as engine:
            assert engine.ask_all("/update_weights_from_disk", body)[self.url]["success"]
        httpx.post(
            self.url + "/flush_cache?timeout=20", timeout=60
        ).raise_for_status()  # a health check may run

    def link(self, model: int, folder: Path) -> None:
        """Make `folder` the `model`-th of the models, with the tests' tokenizer."""
        folder.mkdir()
        for file in self.models[model].iterdir():
            (folder / file.name).symlink_to(file)
        save_tokenizer(folder)

    @contextmanager
    def engine(self, urls: list[str] | None = None, **options) -> Iterator[SGLangEngine]:
        """An engine connected to the server, or to `urls`."""
        engine = SGLangEngine(VOCAB)
        engine.connect(urls or [self.url], **{"concurrency": 16, "outage_timeout": 120.0, **options})
        try:
            yield engine
        finally:
            engine.close()


@pytest.fixture(scope="session")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """The server, float32, honouring seeds. Its first weights have the version 0."""
    python = sglang_python()
    folder = tmp_path_factory.mktemp("sglang")
    models = [folder / f"model{seed}" for seed in range(2)]
    for seed, path in enumerate(models):
        save_tiny_model(path, seed=seed, tied=False)
    said: list[str] = []
    servers = Servers(tiny_settings(python, start_timeout=300.0), folder / "servers", said.append)
    servers.start(models[0], "0")
    try:
        yield SGLangServer(servers, models, said)
    finally:
        servers.stop()
        shutil.rmtree(folder / "servers")
