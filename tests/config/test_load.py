"""Reading a configuration: precedence, presets, interpolation, round trip, and one line for every mistake."""

from __future__ import annotations

import errno
import os
import re
import stat
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.config.load import changed_keys, load_config, save_resolved
from megatron_opd.config.names import all_keys, sections
from megatron_opd.config.presets import PRESETS
from megatron_opd.config.schema import Config, FrozenModelConfig
from megatron_opd.errors import UserError

MINIMAL = """\
run_dir: runs/test
student: {path: models/student}
teacher: {path: models/teacher}
data: {prompts: data/train.jsonl}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_text(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_text


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_minimal_file_gets_the_defaults(write: Any) -> None:
    config = load_config(write(MINIMAL))
    assert config.student.path == Path("models/student")
    assert config.objective.token_weight.kind == "uniform"
    assert config.parallel.data is None and config.optimizer.distributed is None


def test_later_sources_win(write: Any) -> None:
    path = write(MINIMAL + "optimizer: {lr: 1e-5, beta2: 0.9}\n")
    config = load_config(path, ["optimizer.lr=2e-5", "optimizer.lr=3e-5", "training={steps: 7}"])
    assert config.optimizer.lr == 3e-5
    assert config.optimizer.beta2 == 0.9
    assert config.training.steps == 7
    assert config.training.microbatch_tokens == Config.model_fields["training"].default.microbatch_tokens


def test_an_override_may_hold_an_equals_sign_and_null(write: Any) -> None:
    config = load_config(write(MINIMAL), ["data.system_prompt=a=b", "parallel.data=null"])
    assert config.data.system_prompt == "a=b"
    assert config.parallel.data is None


def test_preset_fills_the_objective_and_given_keys_win(write: Any) -> None:
    preset = "objective: {preset: iw-opd-exact, token_weight: {gamma: 0.25}}\n"
    objective = load_config(write(MINIMAL + preset)).objective
    assert (objective.divergence, objective.token_weight.kind) == ("reverse_kl", "cumulative_share")
    assert objective.token_weight.gamma == 0.25
    chosen = load_config(write(MINIMAL), ["objective.preset=iw-opd-exact"]).objective.token_weight
    assert (chosen.kind, chosen.gamma) == ("cumulative_share", 0.5)
    uniform = load_config(write(MINIMAL + preset), ["objective.token_weight.kind=uniform"])
    assert uniform.objective.token_weight.kind == "uniform"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_valid(write: Any, name: str) -> None:
    objective = load_config(write(MINIMAL), [f"objective.preset={name}"]).objective
    assert objective.preset == name
    given = objective.model_dump()
    flat = {key: value for key, value in PRESETS[name].items() if not isinstance(value, dict)}
    assert given | flat == given
    for section, keys in PRESETS[name].items():
        if isinstance(keys, dict):
            assert given[section] | keys == given[section]


def test_a_preset_fills_sections_two_deep_and_null_in_it_counts(write: Any) -> None:
    path = write(MINIMAL + "objective: {preset: minillm, policy: {clip_high: 0.3}}\n")
    policy = load_config(path, ["objective.policy.exact_step=false"]).objective.policy
    assert (policy.discount, policy.dual_clip, policy.length_normalized) == (1.0, None, True)
    assert (policy.clip_low, policy.clip_high, policy.exact_step) == (0.2, 0.3, False)
    restored = load_config(path, ["objective.policy.dual_clip=4.0"])
    assert restored.objective.policy.dual_clip == 4.0
    gate = load_config(write(MINIMAL), ["objective.preset=aopd", "objective.gate.tau=0.2"]).objective.gate
    assert (gate.kind, gate.tau) == ("aopd", 0.2)


def test_lists(write: Any) -> None:
    path = write(MINIMAL + "objective: {mask: {tokens: ['<', think, '${data.prompt_field}']}}\n")
    assert load_config(path).objective.mask.tokens == ["<", "think", "prompt"]
    other = load_config(path, ["objective.mask.tokens=['<|im_end|>']", "objective.mask.occurrences=all"])
    assert other.objective.mask.tokens == ["<|im_end|>"]
    assert load_config(path, ["objective.mask.tokens=[]"]).objective.mask.tokens == []


def test_a_section_that_may_be_null(write: Any) -> None:
    assert load_config(write(MINIMAL)).reference is None
    path = write(MINIMAL + "reference: {path: '~/base'}\n")
    given = load_config(path)
    assert given.reference is not None and given.reference.path == Path.home() / "base"
    assert load_config(path, ["reference=null"]).reference is None
    assert load_config(write(MINIMAL + "reference:\n")).reference is None
    assert load_config(write(MINIMAL), ["reference.path=${student.path}"]).reference == FrozenModelConfig(
        path=given.student.path
    )


def test_changed_keys(write: Any) -> None:
    plain = load_config(write(MINIMAL))
    other = load_config(write(MINIMAL), ["reference.path=base", "objective.mask.tokens=[a]", "seed=1"])
    assert changed_keys(plain, plain) == changed_keys(other, other) == []
    assert set(changed_keys(plain, other)) == {
        "seed: 0 -> 1",
        "reference.path: None -> base",
        "reference.offload: None -> False",
        "objective.mask.tokens: [] -> ['a']",
    }
    assert "reference.path: base -> None" in changed_keys(other, plain)


def test_an_empty_section_means_its_defaults_and_keeps_the_preset(write: Any) -> None:
    text = MINIMAL + "optimizer:\nobjective:\n  preset: iw-opd-exact\n  token_weight:\n"
    config = load_config(write(text))
    assert config.optimizer == Config.model_fields["optimizer"].default
    assert config.objective.token_weight.kind == "cumulative_share"


def test_interpolation_reaches_file_defaults_and_preset(write: Any) -> None:
    text = (
        MINIMAL + "training: {steps: 40}\noptimizer: {warmup_steps: '${training.steps}', min_lr: '${.lr}'}\n"
    )
    path = write(text)
    config = load_config(path, ["evaluation.prompts=${data.prompts}", "training.steps=30"])
    assert config.optimizer.warmup_steps == 30
    assert config.optimizer.min_lr == config.optimizer.lr
    assert config.evaluation.prompts == config.data.prompts


def test_home_is_expanded_and_other_paths_stay(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    config = load_config(write(MINIMAL), ["student.path=~/s", "teacher.path=~nobody-of-that-name/t"])
    assert config.student.path == Path("/somewhere/s")
    assert config.teacher.path == Path("~nobody-of-that-name/t")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=3", r"unknown key 'optimizer\.lrr' in override .*: did you mean 'optimizer\.lr'\?"),
        ("optimiser.lr=3", r"unknown key 'optimiser' .*did you mean 'optimizer'\?"),
        ("lr=3", r"unknown key 'lr' .*did you mean 'optimizer\.lr'\?"),
        ("training.lr=3", r"unknown key 'training\.lr' .*did you mean 'optimizer\.lr'\?"),
        ("objective.token_weight.gama=1", r"did you mean 'objective\.token_weight\.gamma'\?"),
        ("data.zzz=3", r"unknown key 'data\.zzz' .*section 'data' has the keys prompts, prompt_field"),
        ("zzzzzz=3", r"unknown key 'zzzzzz' .*the top level has the keys run_dir, seed"),
        ("student={path: x, 1: 3}", r"unknown key 'student\.1'"),
        ("optimizer.lr=fast", r"^optimizer\.lr: expected a number, got 'fast'"),
        ("optimizer.lr=", r"^optimizer\.lr: expected a number, got null"),
        ("optimizer.lr='1'", r"^optimizer\.lr: expected a number, got '1'"),
        ("optimizer.lr=.inf", r"^optimizer\.lr: expected a finite number"),
        ("optimizer.lr.x=3", r"^optimizer\.lr: expected a number, got \{'x': 3\}"),
        ("optimizer.lr=0", r"^optimizer\.lr: must be greater than 0, got 0"),
        ("optimizer.beta1=1", r"^optimizer\.beta1: must be less than 1, got 1"),
        ("training.steps=0", r"^training\.steps: must be at least 1, got 0"),
        ("training.steps=1.5", r"^training\.steps: expected a whole number, got 1\.5"),
        ("training.steps=true", r"^training\.steps: expected a whole number, got true"),
        ("parallel.data=0", r"^parallel\.data: must be at least 1"),
        ("parallel.sequence_parallel=1", r"^parallel\.sequence_parallel: expected true or false, got 1"),
        ("rollout.top_p=1.5", r"^rollout\.top_p: must be at most 1, got 1\.5"),
        ("rollout.top_p=0", r"^rollout\.top_p: must be greater than 0"),
        ("rollout.temperature=0", r"^rollout\.temperature: must be greater than 0"),
        ("rollout.top_k=-1", r"^rollout\.top_k: must be at least 0"),
        ("precision=fp16", r"^precision: expected 'bf16' or 'fp32', got 'fp16'"),
        (
            "objective.divergence=kl",
            r"^objective\.divergence: expected 'reverse_kl', 'forward_kl', .*, got 'kl'",
        ),
        (
            "objective.gate.knd=aopd",
            r"unknown key 'objective\.gate\.knd' .*did you mean 'objective\.gate\.kind'",
        ),
        ("objective.gat.kind=aopd", r"unknown key 'objective\.gat' .*did you mean 'objective\.gate'"),
        ("objective.tau=0.1", r"unknown key 'objective\.tau' .*did you mean 'objective\.gate\.tau'"),
        ("gate.tau=0.1", r"unknown key 'gate' .*did you mean 'objective\.gate'"),
        ("objective.temperature=0.5", r"did you mean 'rollout\.temperature'"),
        ("objective.mask.zzz=1", r"section 'objective\.mask' has the keys tokens, occurrences, truncated"),
        ("reference.pth=x", r"unknown key 'reference\.pth' .*did you mean 'reference\.path'"),
        ("reference={}", r"^missing key 'reference\.path'"),
        ("reference=base", r"^reference: expected a section with the keys path, offload, got 'base'"),
        (
            "objective.gate=aopd",
            r"^objective\.gate: expected a section with the keys kind, tau, .*got 'aopd'",
        ),
        (
            "objective.gate.kind=adop",
            r"^objective\.gate\.kind: expected 'none', 'aopd' or 'teacher_entropy', got",
        ),
        ("objective.gate.tau=1.5", r"^objective\.gate\.tau: must be at most 1, got 1\.5"),
        ("objective.beta=1", r"^objective\.beta: must be less than 1, got 1"),
        ("objective.k=0", r"^objective\.k: must be at least 1"),
        ("objective.head_chunk=0", r"^objective\.head_chunk: must be at least 1"),
        ("objective.policy.clip_low=2", r"^objective\.policy\.clip_low: must be at most 1, got 2"),
        ("objective.policy.dual_clip=1", r"^objective\.policy\.dual_clip: must be greater than 1, got 1"),
        ("objective.policy.discount=yes", r"^objective\.policy\.discount: expected a number, got true"),
        ("objective.shaping.power=0", r"^objective\.shaping\.power: must be greater than 0"),
        ("objective.token_weight.fraction=1.1", r"^objective\.token_weight\.fraction: must be at most 1"),
        ("objective.mask.tokens=think", r"^objective\.mask\.tokens: expected a list, got 'think'"),
        ("objective.mask.tokens=[a, 3]", r"^objective\.mask\.tokens\.1: expected text, got 3 \(override"),
        ("objective.mask.tokens=['']", r"^objective\.mask\.tokens\.0: .*at least 1 character"),
        ("objective.mask.tokens.0=a", r"^objective\.mask\.tokens: expected a list, got \{'0': 'a'\}"),
        ("training.updates_per_rollout=0", r"^training\.updates_per_rollout: must be at least 1"),
        ("data.system_prompt=5", r"^data\.system_prompt: expected text, got 5"),
        ("data.prompt_field=''", r"^data\.prompt_field: "),
        ("student.path=3", r"^student\.path: expected a path, got 3"),
        ("student.path=null", r"^student\.path: expected a path, got null"),
        ("optimizer=3", r"^optimizer: expected a section with the keys name, lr, .*, got 3"),
        ("student=null", r"^missing key 'student\.path'"),
        ("data.prompts=???", r"^data\.prompts: '\?\?\?' stands for a value"),
        ("data.prompts=${nowhere}", r"^data\.prompts: .*'nowhere' not found"),
        ("data.prompts=${data.prompts}", r"^data\.prompts: .*[Rr]ecursive"),
        ("data.prompts=${", r"^override 'data\.prompts=\$\{': "),
        ("data.prompts=[1", r"^override .*not valid YAML"),
        ("optimizer.lr", r"^override 'optimizer\.lr': expected key=value"),
        ("=3", r"^override '=3': expected key=value"),
        ("a..b=3", r"^override 'a\.\.b=3': expected key=value"),
        (
            "objective.preset=iw-opd-exat",
            r"^objective\.preset: unknown preset .*did you mean 'iw-opd-exact'\?",
        ),
        ("objective.preset=opdd", r"^objective\.preset: unknown preset .*did you mean 'opd'\?"),
        ("objective.preset=nothing", r"^objective\.preset: unknown preset .*the presets are aopd, eopd, "),
        ("objective.preset=3", r"^objective\.preset: expected text, got 3"),
    ],
)
def test_mistakes_in_overrides(write: Any, override: str, expected: str) -> None:
    assert re.search(expected, mistake(write(MINIMAL), override))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "optimizer: {lrr: 1}\n", r"unknown key 'optimizer\.lrr' in .*config\.yaml: did you mean"),
        (
            MINIMAL + "optimizer: {lr: fast}\n",
            r"^optimizer\.lr: expected a number, got 'fast' \(.*config\.yaml\)",
        ),
        (MINIMAL + "seed: [1\n", r"config\.yaml, line 6: not valid YAML"),
        (MINIMAL + "seed: 1\nseed: 2\n", r"config\.yaml, line 6: .*duplicate key seed"),
        (MINIMAL + "seed: &a [*a]\n", r"config\.yaml, line 5: not valid YAML"),
        ("- 1\n", r"config\.yaml: expected sections and keys at the top level"),
        ("", r"^missing key 'run_dir' in .*config\.yaml.* \(and 3 more\)"),
        ("run_dir: x\nstudent: {pth: a}\n", r"^unknown key 'student\.pth' .*did you mean 'student\.path'\?"),
    ],
)
def test_mistakes_in_the_file(write: Any, text: str, expected: str) -> None:
    assert re.search(expected, mistake(write(text)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in mistake(tmp_path / "absent.yaml")
    assert "Is a directory" in mistake(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in mistake(binary)


def test_every_key_is_documented() -> None:
    keys = all_keys()
    assert "optimizer.lr" in keys and "objective.token_weight.gamma" in keys
    models = dict(sections())
    for key in keys:
        outer, _, last = key.rpartition(".")
        field = (models[outer] if outer else Config).model_fields[last]
        assert field.description or models[key].__doc__, key


def text(min_size: int = 0) -> st.SearchStrategy[str]:
    """Any text YAML can hold, with more of what could break its quoting or look like an interpolation."""
    pieces = st.sampled_from(
        ["${", "}", "\\", "???", "1e5", "null", "~", "#", ": ", "\n", "'", '"', "\x85", "\t"]
    )
    characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from(string.printable)
    whole = st.lists(pieces | characters, max_size=8).map("".join) | st.sampled_from(
        ["yes", "0x1F", "1_000", "=", "~"]
    )
    return whole.filter(lambda value: value != "???" and len(value) >= min_size)


paths = (
    text()
    .filter(lambda value: value != "???" and "\x00" not in value)
    .map(lambda value: Path("models", value))
)
fractions = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)
counts = st.integers(min_value=1, max_value=10**12)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    return Config.model_validate(
        {
            "run_dir": draw(paths),
            "seed": draw(counts),
            "precision": draw(st.sampled_from(["bf16", "fp32"])),
            "student": {"path": draw(paths)},
            "teacher": {"path": draw(paths)},
            "reference": draw(st.none() | st.fixed_dictionaries({"path": paths})),
            "parallel": {"tensor": draw(counts), "data": draw(st.none() | counts)},
            "data": {
                "prompts": draw(paths),
                "prompt_field": draw(text(min_size=1)),
                "system_prompt": draw(st.none() | text()),
                "shuffle": draw(st.booleans()),
            },
            "rollout": {"temperature": draw(fractions), "top_p": draw(fractions | st.just(1.0))},
            "objective": {
                "preset": draw(st.none() | st.sampled_from(sorted(PRESETS))),
                "k": draw(counts),
                "gate": {"kind": draw(st.sampled_from(["none", "aopd"])), "tau": draw(fractions)},
                "policy": {"dual_clip": draw(st.none() | st.just(2.5)), "exact_step": draw(st.booleans())},
                "shaping": {"power": draw(st.none() | fractions)},
                "token_weight": {
                    "kind": draw(st.sampled_from(["uniform", "cumulative_share"])),
                    "gamma": draw(fractions),
                },
                "mask": {"tokens": draw(st.lists(text(min_size=1), max_size=3))},
                "head_chunk": draw(st.none() | counts),
            },
            "optimizer": {
                "lr": draw(fractions),
                "eps": draw(fractions),
                "distributed": draw(st.none() | st.booleans()),
            },
            "evaluation": {"prompts": draw(st.none() | paths), "every": draw(counts)},
        }
    )


@settings(max_examples=50, deadline=None)
@given(config=configs())
def test_any_configuration_survives_the_round_trip(config: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = save_resolved(config, Path(folder) / "new" / "run")
        assert load_config(written) == config
        assert os.listdir(written.parent) == ["config.yaml"]


def test_save_resolved_replaces_the_old_file(write: Any, tmp_path: Path) -> None:
    save_resolved(load_config(write(MINIMAL)), tmp_path / "run")
    written = save_resolved(load_config(write(MINIMAL), ["seed=7"]), tmp_path / "run")
    assert load_config(written).seed == 7


def test_save_resolved_where_it_cannot_write(write: Any, tmp_path: Path) -> None:
    config = load_config(write(MINIMAL))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*config\.yaml"):
        save_resolved(config, blocked)
    assert stat.S_ISREG(blocked.stat().st_mode) and blocked.read_text() == "not a folder"


def test_a_full_disk_keeps_the_old_file(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    written = save_resolved(load_config(write(MINIMAL)), run_dir)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*config\.yaml: No space left on device"):
        save_resolved(load_config(write(MINIMAL), ["seed=7"]), run_dir)
    assert load_config(written).seed == 0
    assert os.listdir(run_dir) == ["config.yaml"]
