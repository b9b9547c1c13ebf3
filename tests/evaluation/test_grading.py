r"""Answers found in responses, and judged: right and wrong pairs, and what would hang or crash a grader."""

import resource
import signal

import pytest

from megatron_opd.errors import UserError
from megatron_opd.evaluation import grading, grading_process
from megatron_opd.evaluation.answers import (
    as_number,
    expected_answer,
    extract_answer,
    normalised,
    plainly_same,
)
from megatron_opd.evaluation.grading import Grader

SUMS = {"name": "chain_sum", "size": 3, "seed": 7, "options": {}}


@pytest.fixture(scope="module")
def grader():
    with Grader() as one:
        yield one


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so it is \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} units, that is 7 \% more", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox {x} ", "x"),
        ("<answer> 5 </answer> of 7", "5"),
        (r"\boxed{3} <answer>4</answer>", "4"),
        (r"\boxed{9}</think>It is 8", "8"),
        ("it costs 1,234.50 dollars", "1,234.50"),
        ("x = -3", "-3"),
        ("10-3", "3"),
        ("about 2/3 of 4, so 8/3.", "8/3"),
        ("1, 2, 3", "3"),
        (r"\boxed{12", "12"),
        (r"\boxed{}", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_answer_of_a_complete_response(response, answer):
    assert extract_answer(response, complete=True) == answer


def test_a_response_that_was_cut_off_has_only_an_explicit_answer():
    assert extract_answer("first 2 + 3 = 5, then", complete=False) is None
    assert extract_answer(r"\boxed{5}, because", complete=False) == "5"


def test_where_answers_are_no_numbers_the_whole_text_is_one():
    assert extract_answer("\n alpha 1\nbeta 2 ", complete=True, numbers=False) == "alpha 1\nbeta 2"
    assert extract_answer(r"it is \boxed{beta}", complete=True, numbers=False) == "beta"
    assert extract_answer(" ", complete=True, numbers=False) is None


@pytest.mark.parametrize(
    ("written", "answer"),
    [("72", "72"), ("She has 3*4=12.\n#### 12", "12"), (r"Thus $\boxed{\frac{a}{b}}$.", r"\frac{a}{b}")],
)
def test_the_answer_in_a_column(written, answer):
    assert expected_answer(written) == answer


def test_typography_and_numbers():
    assert normalised(r" $\left( 3, \dfrac{\pi}{2} \right)$. ") == r"(3,\frac{\pi}{2})"
    assert normalised(r"\text{(C)}") == normalised("C") and normalised("1,234,567") == "1234567"
    assert as_number("−0.50") == as_number("-1/2") and as_number("1e5") is None and as_number("1/0") is None
    assert plainly_same("142.0", "142") is True and plainly_same("3", "4") is False
    assert plainly_same("x", "y") is None


RIGHT = [
    ("204", "204"),
    ("142.0", "142"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"(x+1)^2", "x^2+2x+1"),
    (r"x=5", "5"),
    (r"\{2,1\}", r"\{1,2\}"),
    (r"( 3, \pi/2 )", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"90^\circ", "90"),
    ("2^{10}", "1024"),
]
WRONG = [
    ("3", "4"),
    (r"[0,1]", r"[0,1)"),
    (r"\sqrt{2}", "1.414"),
    ("x", "y"),
    ("-5", "5"),
    (r"(2,1)", r"(1,2)"),
    (r"\infty", "5"),
    (r"\frac{1}{", "1"),
    (r"{}}}\\\frac{{", r"\frac12"),
    ("\x00\ud800", "5"),
    ("(" * 40, "5"),
    (r"\text{" * 50, "5"),
]


@pytest.mark.parametrize(("answer", "expected"), RIGHT)
def test_right_answers(grader, answer, expected):
    assert grader.grade(answer, expected).score == 1


@pytest.mark.parametrize(("answer", "expected"), WRONG)
def test_wrong_and_malformed_answers(grader, answer, expected):
    assert grader.grade(answer, expected).score == 0


def test_an_answer_that_takes_for_ever_is_given_up_and_the_next_is_judged():
    with Grader(seconds=2) as grader:
        found = grader.grade("9^{9^{9^{9}}}", r"\frac12")
        assert found.score == 0 and "given up" in found.trouble
        assert grader.grade(r"\sqrt{9}", "3").score == 1


def test_an_answer_is_right_whatever_signal_comes_before_it(grader):
    """Signals that stop a run are ignored; one that is killed is started again, and judges what was asked."""
    assert grader.grade(r"\sqrt{16}", "4").score == 1
    process = grader._process
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    assert grader.grade(r"\sqrt{25}", "5").score == 1 and grader._process is process
    process.send_signal(signal.SIGKILL)
    assert grader.grade(r"\sqrt{36}", "6") == (1, "") and grader._process is not process


def test_an_answer_that_ends_two_processes_is_given_up(grader, monkeypatch):
    """Stood in for by processes that are killed as soon as they are ready."""
    start, pids = grader._start, []

    def start_and_kill():
        start()
        pids.append(grader._process.pid)
        grader._process.kill()

    grader._end()
    with monkeypatch.context() as patch:
        patch.setattr(grader, "_start", start_and_kill)
        found = grader.grade(r"\sqrt{49}", "7")
        assert found.score == 0 and "ended over it, twice" in found.trouble and len(set(pids)) == 2
        assert grader.grade(r"\sqrt{49}", "7") == found and len(pids) == 2
    assert grader.grade(r"\sqrt{64}", "8").score == 1


def test_the_limit_of_the_kernel_is_a_verdict(grader, monkeypatch):
    assert grader.grade(r"\sqrt{81}", "9").score == 1
    grader._process.send_signal(signal.SIGXCPU)
    monkeypatch.setattr(grader, "_start", pytest.fail)
    found = grader.grade(r"\sqrt{100}", "10")
    assert found.score == 0 and "too long" in found.trouble


def test_a_signal_before_the_process_ignores_it_is_mended(monkeypatch):
    popen, started = grading.subprocess.Popen, []

    def killed_at_once(*args, **options):
        started.append(popen(*args, **options))
        if len(started) == 1:
            started[0].kill()
        return started[-1]

    monkeypatch.setattr(grading.subprocess, "Popen", killed_at_once)
    with Grader() as one:
        assert one.grade(r"\sqrt{9}", "3").score == 1 and len(started) == 2


def test_a_grader_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(grading, "MODULE", "megatron_opd.no_such_module")
    with Grader() as broken, pytest.raises(UserError, match=r"does not start: .*no_such_module"):
        broken.grade("x", "y")


def test_the_limit_of_one_judgement_holds():
    """In this process: what cannot be told from outside. Afterwards there is none."""
    before = resource.getrlimit(resource.RLIMIT_CPU)
    with pytest.raises(grading_process.GivenUp), grading_process.limited(1):
        while True:
            pass
    assert resource.getrlimit(resource.RLIMIT_CPU) == before


def test_reasoning_gym_makes_and_scores_its_problems(grader):
    problems = grader.problems(SUMS)
    assert len(problems) == 3 and all(question and answer for question, answer in problems)
    with Grader() as another:
        assert another.problems(SUMS) == problems
    for index, (_, answer) in enumerate(problems):
        assert grader.score(SUMS, index, answer).score == 1
        assert grader.score(SUMS, index, "x").score < 1
    with pytest.raises(UserError, match="no task 'chain_sums'"):
        grader.problems({**SUMS, "name": "chain_sums"})
    with pytest.raises(UserError, match="wide"):
        grader.problems({**SUMS, "options": {"wide": 3}})
