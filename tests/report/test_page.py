"""The report: what is on the page, that it stands alone, and what is said of run directories that are not sound."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from megatron_opd.cli import main
from megatron_opd.report.coloured import pieces
from megatron_opd.report.page import write_report
from tests.report.run_folders import RESPONSE, decode, write_run

VOID = {"meta", "input", "br"}
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Checks that tags are balanced; keeps attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tokens: list[tuple[str, str]] = []  # style and text of the spans within div.tokens
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        assert self.open == [], "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        known = dict(attrs)
        if tag == "span" and known.get("class") in ("more", "less", "out"):
            self.tokens.append((known.get("style") or "", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "article" in self.open and self.open[-1] == "span" and self.tokens:
            style, text = self.tokens.pop()
            self.tokens.append((style, text + data))

    def figure(self, title: str) -> str:
        """The SVG under this title."""
        found = re.search(rf"<b>{re.escape(title)}</b>.*?(<svg.*?</svg>)", self.source)
        assert found is not None, f"no figure {title}"
        return found.group(1)


def page_of(*folders: Path) -> Page:
    out = folders[0].parent / "page.html"
    write_report(folders, out, decode)
    assert not list(out.parent.glob("*.tmp"))
    return Page(out)


def test_a_page_says_what_a_run_did_and_stands_alone(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    for words in ("Summary", "large", "→ small", "iw-opd-exact", "4.000 → ", "By position", "1 < 2 & 3?"):
        assert words in page.text
    figures = [
        "Loss",
        "Held-out reverse KL",
        "math/avg@8",
        "Gradient norm",
        "Clip ratio",
        "new metric",
        "Time of a step",
    ]
    figures += ["Reverse KL by position", "|Log-gap| by position", "Token weight by position"]
    figures += ["Log-gaps by place, start", "Log-gaps by place, end", "Prefix log-likelihood, step 12"]
    for title in figures:
        assert "var(--run-0)" in page.figure(title)
    assert "avg@8_low" not in page.text and "avg@8 low" not in page.text, (
        "the ends of an interval are drawn around it"
    )
    assert "Skipped updates" not in page.text, "a metric that is 0 throughout is not drawn"
    outside = [
        value
        for _, name, value in page.attributes
        if name in ("href", "src", "xlink:href")
        if value[0] != "#"
    ]
    assert (
        outside == []
        and "http" not in page.source
        and "<script" not in page.source
        and "<link" not in page.source
    )
    assert "@import" not in page.source and not re.search(r"url\((?!#)", page.source)
    assert "nan" not in re.sub(r"[A-Za-z]nan|nan[A-Za-z]", "", page.source)


def test_tokens_have_their_weight_and_log_gap(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    per_sample = len(page.tokens) // 2
    tokens = page.tokens[:per_sample]
    assert per_sample == len(RESPONSE.encode())
    assert "".join(text for _, text in tokens).replace("↵", "") == RESPONSE
    assert (
        tokens[0][0] == "--w:1.00;--g:0.12" and tokens[1] == ("", " ") and tokens[2][0].startswith("--w:0.00")
    )
    titles = [value for tag, name, value in page.attributes if (tag, name) == ("span", "title")]
    assert titles[0] == "weight 1.500, log-gap -0.50, student -0.25, teacher -0.75"
    assert titles[1] == "not in the loss"


def test_several_runs_are_overlaid_and_their_settings_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", scale=0.5, optimizer__lr=0.01, rollout__top_p=0.9)
    page = page_of(first, second)
    for title in ("Loss", "Held-out reverse KL", "Reverse KL by position", "Speed"):
        drawn = page.figure(title)
        assert "var(--run-0)" in drawn and "var(--run-1)" in drawn
    assert "var(--run-1)" in page.figure("Log-gaps by place, end (second)")
    differences = page.source[page.source.index("Differences") : page.source.index("<details><summary>all")]
    assert re.findall(r"<td><code>([a-z_.]+)</code></td>", differences) == ["optimizer.lr", "rollout.top_p"]
    assert "0.001" in differences and "0.01" in differences


def test_several_teachers_are_told_by_name(tmp_path: Path) -> None:
    several: dict[str, Any] = {
        "teacher__path": None,
        "teacher__paths": {"maths": "models/a", "code": "models/b"},
    }
    assert "maths, code→ small" in page_of(write_run(tmp_path / "run", **several)).text


def test_the_command_writes_the_page_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run)])
    assert ended.value.code == 0 and str(run / "report.html") in capsys.readouterr().out
    assert "No tokenizer is found" in Page(run / "report.html").text
    pictures = {path.stem for path in (run / "report").iterdir()}
    assert {"loss", "eval_reverse_kl", "relative_weight", "gaps_0_end", "prefix_0"} <= pictures
    assert imread(run / "report" / "relative_weight.png")[..., :3].std() > 0.02


def test_a_run_of_an_older_version_has_a_page_without_what_it_did_not_record(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "rollouts")
    (run / "positions.jsonl").unlink()
    page = page_of(run)
    assert "Nothing is recorded by position of: run" in page.text
    assert "This run has kept no rollouts." in page.text


def test_a_run_of_one_step(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", steps=1))
    assert "Log-gaps by place, end" in page.text and "Log-gaps by place, start" not in page.text


DAMAGED = {
    "missing": (None, "", "no such run directory"),
    "no training": ("metrics.jsonl", None, "not the directory of a training, it holds no metrics.jsonl"),
    "no settings": ("config.yaml", None, "it holds no config.yaml"),
    "no step": ("metrics.jsonl", "", "holds no step yet"),
    "metrics": ("metrics.jsonl", '{"step": 1}\n{"step"\n{"step": 2}\n', "damaged, a line is not valid JSON"),
    "no object": ("metrics.jsonl", "3\n", 'line 1: an object with a "step" is expected'),
    "positions": ("positions.jsonl", "}{\n", "damaged, a line is not valid JSON"),
    "positions of another kind": ("positions.jsonl", '{"step": 1}\n', "line 1: damaged"),
    "settings": ("config.yaml", "a: [", "damaged, not valid YAML"),
    "samples": ("rollouts/step_00000001.jsonl", '{"response_ids": [1]\n', "line 1: damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_run_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, content, words = DAMAGED[case]
    run = write_run(tmp_path / "run", steps=2)
    if name is None:
        run = tmp_path / "nowhere"
    elif content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run), "--out", str(tmp_path / "page.html")])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0], lines
    assert str(run if name is None or content is None else run / name) in lines[0]
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "run"], "given twice"),
        (["run", "--out", "page.pdf"], "the page is an HTML file"),
        (["run", "--out", "run/metrics.jsonl/page.html"], "cannot write run/metrics.jsonl/page.html"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    write_run(tmp_path / "run", steps=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and words in lines[0], lines


def test_the_texts_of_tokens_make_the_text() -> None:
    text = 3 * RESPONSE + "\n" + 20 * "日本"
    ids = list(text.encode())
    texts = pieces(ids, decode)
    assert len(texts) == len(ids) and "".join(texts) == text
    assert pieces(list("日".encode())[:2], decode) == ["", "�"]  # cut in the middle of a letter


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_report([write_run(tmp_path / "run", steps=2)], out, decode)
    picture = tmp_path / "page.png"
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,1600",
        "--virtual-time-budget=2000",
    ]
    command = [
        str(CHROMIUM),
        *options,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        out.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    shown = imread(picture)[..., :3]
    assert shown.shape[:2] == (1600, 1200)
    assert len({tuple(pixel) for pixel in shown[::8, ::8].reshape(-1, 3).round(2)}) > 20, (
        "text, frames and curves"
    )
