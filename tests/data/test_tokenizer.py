"""Tokenizers: stop ids, and differences between student and teacher named or tolerated."""

import json

import pytest

from megatron_opd.data.tokenizer import check_same_tokenizer, fingerprint, load_tokenizer, stop_ids
from megatron_opd.errors import UserError
from tests.data.tiny_tokenizer import SPECIAL, WORDS, make_tokenizer, save_tokenizer


def test_a_saved_tokenizer_is_the_same(tmp_path):
    loaded = load_tokenizer(save_tokenizer(tmp_path / "model"))
    assert fingerprint(loaded) == fingerprint(make_tokenizer())
    assert check_same_tokenizer(loaded, make_tokenizer()) is None


def test_missing_folder_and_missing_or_broken_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"none: no such model folder; check student\.path"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_code_in_the_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot be read .*custom code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("declared", "expected"), [(None, (2,)), (5, (2, 5)), ([5, 3, 2], (2, 3, 5))])
def test_stop_ids_join_generation_config_and_tokenizer(tmp_path, declared, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    assert stop_ids(tmp_path, make_tokenizer()) == expected


def test_stop_ids_without_generation_config(tmp_path):
    assert stop_ids(tmp_path, make_tokenizer()) == (2,)


def test_no_stop_id_at_all(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        stop_ids(tmp_path, tokenizer)


def test_a_different_number_of_tokens_is_named():
    with pytest.raises(
        UserError, match=r"the student has 16 tokens, the teacher 17; id 16 \('nine'\) exists for the teacher"
    ):
        check_same_tokenizer(make_tokenizer(), make_tokenizer(words=(*WORDS, "nine")))


def test_the_first_differing_id_is_named_with_both_tokens():
    words = ("one", "zwei", "drei", *WORDS[3:])
    with pytest.raises(UserError, match="id 7 is 'two' for the student, 'zwei' for the teacher"):
        check_same_tokenizer(make_tokenizer(), make_tokenizer(words=words))


def test_a_token_that_is_special_on_one_side_only_is_named():
    with pytest.raises(UserError, match=r"id 3 \('<user>'\) is special for the student only"):
        check_same_tokenizer(make_tokenizer(), make_tokenizer(special=[t for t in SPECIAL if t != "<user>"]))


def test_another_chat_template_is_a_warning():
    warning = check_same_tokenizer(make_tokenizer(), make_tokenizer(template=None))
    assert warning is not None and "chat templates differ" in warning


def test_another_end_token_is_a_warning_as_between_base_and_instruct_models():
    warning = check_same_tokenizer(make_tokenizer(), make_tokenizer(eos="<assistant>"))
    assert warning is not None and "eos_token_id is 2 for the student and 5 for the teacher" in warning
