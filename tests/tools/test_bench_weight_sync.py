"""The benchmark of the weight transports runs and reports all three."""

import contextlib
import io

from tests.gloo_pool import GlooPools
from tests.sglang_server import SGLangServer
from tools.bench import weight_sync


def output(*arguments: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        weight_sync.main(arguments)
    return text.getvalue()


def test_smoke(gloo: GlooPools, sglang: SGLangServer) -> None:
    (text,) = gloo(1, output, "--smoke", "--model", str(sglang.models[0]), "--urls", sglang.url)
    sglang.load(sglang.models[0], "0")
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["disk", "tensor", "distributed"]
    assert all(float(row.split()[-2]) > 0 for row in rows)
