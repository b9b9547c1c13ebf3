"""Prompts: what is read and rendered, what is dropped, and which mistakes are named."""

import json

import pytest

from megatron_opd.data.prompts import LoadedPrompts, load_prompts
from megatron_opd.errors import UserError
from tests.data.tiny_tokenizer import make_tokenizer


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path, tokenizer=None, **options) -> LoadedPrompts:
    return load_prompts(path, tokenizer or make_tokenizer(), **{"max_prompt_tokens": 50, **options})


def test_the_chat_template_is_applied_as_the_tokenizer_does_it(tmp_path):
    tokenizer = make_tokenizer()
    (prompt,) = load(write(tmp_path / "a.jsonl", [{"prompt": "one two"}]), tokenizer).prompts
    assert tokenizer.decode(prompt.token_ids) == "<user> one two <eos> <assistant>"
    chat = [{"role": "user", "content": "one two"}]
    assert prompt.token_ids == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert prompt.text == "one two" and prompt.id == "0"


def test_the_system_prompt_goes_first_unless_the_messages_bring_their_own(tmp_path):
    tokenizer = make_tokenizer()
    own = [{"role": "system", "content": "three"}, {"role": "user", "content": "two"}]
    rows = [{"prompt": [{"role": "user", "content": "one"}]}, {"prompt": own}]
    loaded = load(write(tmp_path / "a.jsonl", rows), tokenizer, system_prompt="be brief")
    texts = [tokenizer.decode(prompt.token_ids) for prompt in loaded.prompts]
    assert texts == [
        "<system> be brief <eos> <user> one <eos> <assistant>",
        "<system> three <eos> <user> two <eos> <assistant>",
    ]
    assert [prompt.text for prompt in loaded.prompts] == ["one", "two"]


def test_without_a_chat_template_the_text_is_used_as_it_is_and_said_once(tmp_path):
    tokenizer = make_tokenizer(template=None)
    path = write(tmp_path / "a.jsonl", [{"prompt": "one two"}, {"prompt": "three"}])
    loaded = load(path, tokenizer)
    assert [tokenizer.decode(p.token_ids) for p in loaded.prompts] == ["one two", "three"]
    assert sum("no chat template" in note for note in loaded.notes) == 1


def test_a_folder_is_read_in_the_order_of_its_file_names(tmp_path):
    write(tmp_path / "b.jsonl", [{"prompt": "three", "answer": 3}])
    write(tmp_path / "a.jsonl", [{"prompt": "one", "level": "x"}, "", {"prompt": "two"}])
    write(tmp_path / "notes.txt", ["not a prompt"])
    prompts = load(tmp_path).prompts
    assert [(p.id, p.text) for p in prompts] == [("0", "one"), ("1", "two"), ("2", "three")]


def test_other_columns_may_hold_anything(tmp_path):
    rows = [
        {"prompt": "one", "answer": 1},
        {"prompt": "two", "answer": "x"},
        {"prompt": "six", "answer": [1]},
    ]
    assert len(load(write(tmp_path / "a.jsonl", rows)).prompts) == 3


def test_text_and_messages_may_be_mixed_in_one_file(tmp_path):
    rows = [{"prompt": "one"}, {"prompt": [{"role": "user", "content": "two"}]}]
    assert [p.text for p in load(write(tmp_path / "a.jsonl", rows)).prompts] == ["one", "two"]


def test_long_and_empty_prompts_are_dropped_and_counted_and_rows_keep_their_ids(tmp_path):
    rows = [{"prompt": "one " * 20}, {"prompt": "two"}, {"prompt": "  "}, {"prompt": "three"}]
    loaded = load(write(tmp_path / "a.jsonl", rows), max_prompt_tokens=4)
    assert [(p.id, p.text) for p in loaded.prompts] == [("1", "two"), ("3", "three")]
    assert (loaded.dropped_long, loaded.dropped_empty) == (1, 1)
    assert any("1 prompts longer than data.max_prompt_tokens" in note for note in loaded.notes)


def test_another_field(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "one"}])
    assert load(path, field="question").prompts[0].text == "one"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "tw', r"a\.jsonl, line 3: not valid JSON"),
        ("3", r"a\.jsonl, line 3: not a JSON object"),
        (
            '{"question": "two"}',
            r"a\.jsonl, line 3: no field 'prompt' \(there are: question\).*data\.prompt_field",
        ),
        ('{"prompt": null}', r"a\.jsonl, line 3: no field 'prompt'"),
        ('{"prompt": 5}', r"a\.jsonl, line 3: field 'prompt' is int"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", [{"prompt": "one"}, "", line, {"prompt": "three"}])
    with pytest.raises(UserError, match=message):
        load(path)


def test_nothing_is_printed_about_a_bad_line(tmp_path, capfd):
    with pytest.raises(UserError):
        load(write(tmp_path / "a.jsonl", [{"prompt": "one"}, '{"prompt": "tw']))
    assert capfd.readouterr() == ("", "")


def test_a_field_that_no_line_has(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "one", "answer": "two"}])
    with pytest.raises(UserError, match=r"line 1: no field 'prompt' \(there are: answer, question\)"):
        load(path)


def test_malformed_messages(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "one"}])
    good, bad = [{"role": "user", "content": "two"}], [{"role": "user", "text": "three"}]
    write(tmp_path / "b.jsonl", [{"prompt": good}, "", {"prompt": bad}])
    with pytest.raises(UserError, match=r"b\.jsonl, line 3: a chat message needs 'role' and 'content'"):
        load(tmp_path)


def test_malformed_messages_of_a_json_list_are_counted_as_there_are_no_lines(tmp_path):
    bad = [{"role": "user", "text": "three"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "one"}, {"prompt": bad}]))
    with pytest.raises(UserError, match=r"a\.json, object 2: a chat message needs 'role' and 'content'"):
        load(path)


def test_a_template_that_refuses_a_role(tmp_path):
    tokenizer = make_tokenizer(template="{{ raise_exception('no system role') }}")
    path = write(tmp_path / "a.jsonl", [{"prompt": "one"}])
    with pytest.raises(UserError, match=r"no system role.*data\.system_prompt"):
        load(path, tokenizer)


def test_missing_empty_and_unsuitable_paths(tmp_path):
    with pytest.raises(UserError, match="no such prompt file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no \\*\\.jsonl file"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no prompts"):
        load(write(tmp_path / "blank.jsonl", ["", " "]))
    with pytest.raises(UserError, match=r"\.jsonl files or a folder"):
        load(write(tmp_path / "table.parquet", ["x"]))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path / "latin.jsonl")


def test_no_prompt_short_enough(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "one two three"}])
    with pytest.raises(UserError, match=r"1 exceed data\.max_prompt_tokens = 3 .*has 6 tokens"):
        load(path, max_prompt_tokens=3)
