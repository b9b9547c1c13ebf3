"""Prompts of the teacher's own: how they are rendered, what is refused, and how they are packed."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.data.loss_mask import LossMask
from megatron_opd.data.packing import Microbatch, pack
from megatron_opd.data.prompts import LoadedPrompts, PromptStream, TeacherPrompt, load_prompts
from megatron_opd.data.rollouts import read_rollouts, write_rollouts
from megatron_opd.errors import UserError
from tests.data.tiny_tokenizer import make_tokenizer
from tests.tiny import recorded_rollouts, with_teacher_prompts

TEMPLATE = "{prompt} be brief {solution}"


def load(folder: Path, rows: list[dict[str, Any]], template: str = TEMPLATE, **options: Any) -> LoadedPrompts:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limit = options.pop("max_tokens", 50)
    values = {"max_prompt_tokens": 50, "teacher": TeacherPrompt(template, limit), **options}
    return load_prompts(path, make_tokenizer(), **values)


def both(loaded: LoadedPrompts) -> list[tuple[str, str]]:
    decode = make_tokenizer().decode
    return [(decode(prompt.token_ids), decode(prompt.teacher_ids)) for prompt in loaded.prompts]


def test_the_template_is_the_users_last_message(tmp_path):
    chat = [
        {"role": "system", "content": "eight"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    rows: list[dict[str, Any]] = [
        {"prompt": "one two", "solution": "six"},
        {"prompt": chat, "solution": "seven"},
    ]
    before = "<system> eight <eos> <user> one <eos> <assistant> two <eos> <user> three"
    assert both(load(tmp_path, rows)) == [
        ("<user> one two <eos> <assistant>", "<user> one two be brief six <eos> <assistant>"),
        (f"{before} <eos> <assistant>", f"{before} be brief seven <eos> <assistant>"),
    ]


def test_the_system_prompt_and_the_name_of_the_field_are_those_of_the_student(tmp_path):
    loaded = load(
        tmp_path,
        [{"question": "one", "solution": "six {prompt}"}],
        "{question} {solution}",
        field="question",
        system_prompt="two",
    )
    assert both(loaded) == [
        (
            "<system> two <eos> <user> one <eos> <assistant>",
            "<system> two <eos> <user> one six <unk> <eos> <assistant>",
        )
    ]


def test_prompts_too_long_for_the_teacher_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "one", "solution": "six " * length} for length in (1, 9, 2)]
    loaded = load(tmp_path, rows, max_tokens=8)
    assert [prompt.id for prompt in loaded.prompts] == ["0", "2"] and loaded.dropped_teacher == 1
    assert any("1 prompts dropped" in note and "teacher.max_prompt_tokens" in note for note in loaded.notes)
    with pytest.raises(UserError, match=r"the teacher's of 3 exceed teacher\.max_prompt_tokens"):
        load(tmp_path, rows, max_tokens=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "two"}, r"a\.jsonl, line 2: field 'solution' is missing; teacher\.prompt_template"),
        ({"prompt": "two", "solution": None}, r"line 2: field 'solution' is missing"),
        ({"prompt": "two", "solution": ["x"]}, r"line 2: field 'solution' is list; .* needs text"),
        ({"prompt": "two", "solution": 5}, r"line 2: field 'solution' is int"),
    ],
)
def test_a_line_without_a_field_of_the_template_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [{"prompt": "one", "solution": "six"}, line])


def test_no_line_has_the_field(tmp_path):
    with pytest.raises(UserError, match=r"line 1: field 'solution' is missing"):
        load(tmp_path, [{"prompt": "one"}, {"prompt": "two"}])


def test_the_digest_covers_the_prompts_of_the_teacher(tmp_path):
    rows = [{"prompt": "one", "solution": "six"}]
    digests = [load(tmp_path, rows).digest, load(tmp_path, rows, "{prompt} {solution}").digest]
    plain = load(tmp_path, rows, teacher=None).digest
    assert len({*digests, plain}) == 3 and all(digest.startswith(plain) for digest in digests)


def test_draws_and_files_keep_them(tmp_path):
    prompts = load(tmp_path, [{"prompt": "one", "solution": "six"}]).prompts
    (drawn,) = PromptStream(prompts, seed=0).take(1)
    assert drawn.teacher_ids == prompts[0].teacher_ids
    plain = recorded_rollouts(2)
    rollouts = [plain[0], replace(plain[1], teacher_prompt_ids=drawn.teacher_ids)]
    write_rollouts(tmp_path / "rollouts.jsonl", rollouts)
    assert read_rollouts(tmp_path / "rollouts.jsonl") == rollouts
    written = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert "teacher_prompt_ids" not in written[0], "files of other runs stay as they are"


def responses(microbatch: Microbatch) -> list[tuple[list[int], list[int], list[int]]]:
    """Of each segment its prompt, the inputs of the response after it, and its targets where they enter the loss."""
    found = []
    offsets = microbatch.cu_seqlens.tolist()
    for start, end in pairwise(offsets):
        positions = microbatch.mask_T[start:end].nonzero()[:, 0]
        if len(positions):
            first = start + int(positions[0])
            end = start + int(positions[-1]) + 1
            tokens = microbatch.tokens_T
            assert torch.equal(microbatch.position_ids_T[start:end], torch.arange(end - start))
            found.append(
                (
                    tokens[start : first + 1].tolist(),
                    tokens[first + 1 : end].tolist(),
                    microbatch.targets_T[first:end].tolist(),
                )
            )
    return found


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_the_teachers_microbatches_hold_the_same_responses_after_its_prompts(dp_size, alignment):
    rollouts = with_teacher_prompts(recorded_rollouts(9))
    prompts = {tuple(rollout.prompt_ids): rollout.teacher_prompt_ids for rollout in rollouts}
    packed = pack(rollouts, dp_size=dp_size, token_budget=96, alignment=alignment, count_multiple=2)
    seen = 0
    for microbatch in (microbatch for rank in packed for microbatch in rank):
        teacher = microbatch.for_teacher
        assert len(teacher.tokens_T) <= 96 and len(microbatch.tokens_T) <= 96
        for ours, theirs in zip(responses(microbatch), responses(teacher), strict=True):
            assert theirs == (prompts[tuple(ours[0])], *ours[1:])
            seen += 1
        for name in ("targets_T", "rollout_logprobs_T"):
            loss = getattr(microbatch, name)[microbatch.mask_T]
            assert torch.equal(getattr(teacher, name)[teacher.mask_T], loss)
    assert seen == len(rollouts)


def test_masked_tokens_are_the_same_for_both():
    rollouts = with_teacher_prompts(recorded_rollouts(5))
    masked = LossMask(frozenset(token for rollout in rollouts for token in rollout.response_ids[::3]), "all")
    for microbatch in pack(rollouts, dp_size=1, token_budget=128, loss_mask=masked)[0]:
        teacher = microbatch.for_teacher
        assert torch.equal(teacher.targets_T[teacher.mask_T], microbatch.targets_T[microbatch.mask_T])


def test_the_budget_holds_the_longer_of_both():
    (rollout,) = recorded_rollouts(1)
    long = replace(rollout, teacher_prompt_ids=[5] * 60)
    length = 60 + len(rollout.response_ids) - 1
    (microbatch,) = pack([long], dp_size=1, token_budget=length)[0]
    assert len(microbatch.for_teacher.tokens_T) == length > len(microbatch.tokens_T)
    with pytest.raises(UserError, match=f"microbatch_tokens = {length - 1} is too small .* {length} "):
        pack([long], dp_size=1, token_budget=length - 1)


def test_without_prompts_of_its_own_the_teacher_reads_the_students():
    for microbatch in pack(recorded_rollouts(3), dp_size=1, token_budget=96)[0]:
        assert microbatch.teacher is None and microbatch.for_teacher is microbatch
