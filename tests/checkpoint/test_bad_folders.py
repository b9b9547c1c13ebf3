"""Model folders with something wrong: one line that names file and tensor, and nothing left behind."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opd.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_opd.checkpoint.folders import tidied, written_aside
from megatron_opd.checkpoint.safetensors_files import SafetensorsFiles
from megatron_opd.errors import UserError
from megatron_opd.parallel.groups import ParallelLayout
from tests.checkpoint.models import hf_model, megatron_results, write_hf
from tests.checkpoint.test_hf_round_trip import save_from_layout

K_PROJ = "model.layers.2.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("good") / "hf", "llama", tied=True, max_shard_size="60KB")


@pytest.fixture(scope="module")
def good_megatron(good: Path) -> Path:
    hf_to_megatron(good, good.parent / "megatron")
    return good.parent / "megatron"


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


@pytest.fixture
def megatron_folder(good_megatron: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_megatron, tmp_path / "megatron"))


def file_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Take away the permission to read a file. Root reads it all the same, so for root opening it is made to fail."""
    path.chmod(0)
    if os.access(path, os.R_OK):
        real = open

        def guarded(file: Any, *args: Any, **options: Any) -> Any:
            if isinstance(file, str | Path) and Path(file) == path:
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return real(file, *args, **options)

        monkeypatch.setattr("io.open", guarded)
        monkeypatch.setattr("builtins.open", guarded)
    return path


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Put all tensors into one file, changed."""
    tensors = {
        name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    change(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, tmp_path: Path) -> str:
    """The one line with which a conversion refuses the folder; no output may be left."""
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        hf_to_megatron(folder, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_tensor(folder, tmp_path):
    edit(folder, lambda tensors: tensors.pop(K_PROJ))
    assert refusal(folder, tmp_path) == f"{folder} lacks the tensor {K_PROJ} that its config.json calls for"


def test_wrong_shape(folder, tmp_path):
    edit(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ][:-1].clone()}))
    expected = f"{folder}/model.safetensors: {K_PROJ} has shape [15, 64], config.json implies [16, 64]"
    assert refusal(folder, tmp_path) == expected


def test_quantized_tensor(folder, tmp_path):
    edit(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].to(torch.int8)}))
    assert f"{folder}/model.safetensors: {K_PROJ} is stored as I8, not in fp32, bf16 or fp16" in refusal(
        folder, tmp_path
    )


def test_unexpected_tensor(folder, tmp_path):
    name = "model.layers.2.self_attn.k_proj.bias"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(16)}))
    message = refusal(folder, tmp_path)
    assert message == f"{folder}/model.safetensors: unexpected tensor {name}, not part of this architecture"


def test_rotary_frequencies_of_old_exports_are_tolerated(folder, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    hf_to_megatron(folder, tmp_path / "out")
    assert (tmp_path / "out" / "state").is_dir()


def test_stored_head_that_is_not_the_tied_embedding(folder, tmp_path):
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(folder, tmp_path)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_truncated_file(folder, tmp_path, left):
    path = file_of(folder, K_PROJ)
    path.write_bytes(path.read_bytes()[:left])
    assert f"{path} is not a complete safetensors file" in refusal(folder, tmp_path)


def test_missing_file(folder, tmp_path):
    path = file_of(folder, K_PROJ)
    path.unlink()
    assert refusal(folder, tmp_path) == f"weight file missing: {path}"


@pytest.mark.parametrize(
    "name", ["weights", "model.safetensors.index.json", "config.json", "generation_config.json"]
)
def test_a_source_that_may_not_be_read_is_named(folder, tmp_path, monkeypatch, name):
    path = forbid(file_of(folder, K_PROJ) if name == "weights" else folder / name, monkeypatch)
    assert refusal(folder, tmp_path).lower() == f"cannot read {path}: permission denied".lower()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "metadata.json"])
def test_a_checkpoint_that_may_not_be_read_is_named(megatron_folder, tmp_path, monkeypatch, name):
    path = forbid(megatron_folder / "state" / name, monkeypatch)
    with pytest.raises(UserError) as caught:
        megatron_to_hf(megatron_folder, tmp_path / "out")
    message = str(caught.value)
    assert str(path) in message and "permission denied" in message.lower() and "damaged" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"megatron"}


def test_a_directory_in_the_place_of_a_tokenizer(folder, megatron_folder, tmp_path):
    for source, convert in ((folder, hf_to_megatron), (megatron_folder, megatron_to_hf)):
        (source / "tokenizer.json").mkdir()
        with pytest.raises(UserError, match=rf"{source}/tokenizer\.json is a directory, not a file"):
            convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}


def test_a_tokenizer_that_is_a_broken_link(folder, megatron_folder, tmp_path):
    for source, convert in ((folder, hf_to_megatron), (megatron_folder, megatron_to_hf)):
        (source / "tokenizer.json").symlink_to("blob")
        with pytest.raises(
            UserError, match=rf"{source}/tokenizer\.json is a link to a file that is not there"
        ):
            convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}


def test_no_weights_at_all(folder, tmp_path):
    for path in folder.glob("model*"):
        path.unlink()
    assert "has no weights: neither model.safetensors nor" in refusal(folder, tmp_path)


def test_index_that_is_wrong(folder, tmp_path):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = file_of(folder, "model.norm.weight").name
    assert index["weight_map"][K_PROJ] != other
    index["weight_map"][K_PROJ] = other
    path.write_text(json.dumps(index))
    assert f"{folder}/{other} lacks the tensor {K_PROJ}" in refusal(folder, tmp_path)
    for broken in ("{", "[]", '{"weight_map": 3}'):
        path.write_text(broken)
        assert refusal(folder, tmp_path) == f"{path} is not a safetensors index: it holds no weight_map"


def test_a_single_file_comes_before_an_index_as_in_transformers(folder, tmp_path):
    for name in ("model.safetensors.index.json", *{path.name for path in folder.glob("model-*")}):
        shutil.copyfile(folder / name, tmp_path / name)
    edit(folder, lambda tensors: tensors[K_PROJ].add_(1.0))
    for path in tmp_path.glob("model*"):
        path.rename(folder / path.name)
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    theirs = hf_model(folder).get_parameter(K_PROJ)
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[K_PROJ], theirs)
    assert not torch.equal(load_file(file_of(folder, K_PROJ))[K_PROJ], theirs)


def test_every_rank_refuses_alike(gloo, folder):
    """Only the second stage has the layer of the tensor; both raise, so nobody waits in a collective."""
    edit(folder, lambda tensors: tensors.pop(K_PROJ))
    for _ in range(2):
        with pytest.raises(UserError, match="lacks the tensor"):
            gloo(2, megatron_results, folder, ParallelLayout(pipeline=2))


def test_existing_output_and_wrong_kind_of_folder(folder, megatron_folder, tmp_path):
    for convert, source in ((hf_to_megatron, folder), (megatron_to_hf, megatron_folder)):
        with pytest.raises(UserError, match="exists already: remove it or choose another output folder"):
            convert(source, megatron_folder)
    with pytest.raises(UserError, match="is a Megatron folder already"):
        hf_to_megatron(megatron_folder, tmp_path / "out")
    with pytest.raises(UserError, match="is not a Megatron folder: it has no state/"):
        megatron_to_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    ["cut", "missing", "no metadata", "half of .metadata", "more layers", "larger vocabulary", "untied"],
)
def test_megatron_folder_that_is_damaged_or_does_not_fit(megatron_folder, tmp_path, damage):
    config = json.loads((megatron_folder / "config.json").read_text())
    state = megatron_folder / "state"
    data = max(state.glob("*.distcp"), key=lambda path: path.stat().st_size)
    expected = {
        "cut": "cannot read",
        "missing": "cannot read",
        "no metadata": "is not a complete checkpoint",
        "half of .metadata": ".metadata is not to be trusted or damaged",
        "more layers": "has shape [4, 64], config.json implies [6, 64]",
        "larger vocabulary": "word_embeddings.weight has shape [256, 64], config.json implies [384, 64]",
        "untied": "lacks the tensor output_layer.weight",
    }[damage]
    if damage == "cut":
        halve(data)
    elif damage == "missing":
        data.unlink()
    elif damage == "no metadata":
        (state / "metadata.json").unlink()
    elif damage == "half of .metadata":
        halve(state / ".metadata")
    else:
        changes = {
            "more layers": {"num_hidden_layers": 6},
            "larger vocabulary": {"vocab_size": 300},
            "untied": {"tie_word_embeddings": False},
        }[damage]
        (megatron_folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as caught:
        megatron_to_hf(megatron_folder, tmp_path / "out")
    message = str(caught.value)
    assert expected in message and str(state) in message and "\n" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"megatron"}


def full_disk_on_first_rank(folder: Path, out: Path, layout: ParallelLayout) -> str | None:
    def write_on_full_disk(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFiles, "write", write_on_full_disk)
        return save_from_layout(folder, out, layout, file_bytes=60_000)


def test_full_disk_during_export_is_one_line_on_every_rank(gloo, folder, tmp_path):
    out, layout = tmp_path / "out", ParallelLayout(data=2, pipeline=2)
    messages = gloo(4, full_disk_on_first_rank, folder, out, layout)
    assert messages == [f"cannot write {out}: no space left on device; nothing was left there"] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
    assert gloo(4, save_from_layout, folder, out, layout) == [None] * 4


def test_a_disk_too_small_is_refused_before_anything_is_written(
    folder, megatron_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "megatron_opd.checkpoint.folders.shutil.disk_usage", lambda _: SimpleNamespace(free=1000)
    )
    before = set(tmp_path.iterdir())
    for convert, source in ((hf_to_megatron, folder), (megatron_to_hf, megatron_folder)):
        out = tmp_path / "new" / "out"
        expected = f"cannot write {out}: no space left on device \\(0.00 GB needed, 0.00 GB free\\)"
        with pytest.raises(UserError, match=expected):
            convert(source, out)
        assert set(tmp_path.iterdir()) == before


def test_a_read_only_disk_is_not_called_a_missing_permission(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert refusal(folder, tmp_path) == f"cannot write {tmp_path / 'out'}: permission denied"
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert refusal(folder, tmp_path) == f"cannot write {tmp_path / 'out'}: read-only file system"


def test_folder_is_complete_or_not_there(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(ZeroDivisionError), written_aside(out) as aside:
        (aside / "half").write_text("x")
        assert not out.exists()
        raise ZeroDivisionError
    assert list(out.parent.iterdir()) == []
    aside.mkdir()
    (aside / "from a killed process").touch()
    with written_aside(out) as aside:
        (aside / "whole").touch()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["whole"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write .*out: permission denied"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            "a write was cut short",
        ),
    ],
)
def test_refused_write_keeps_the_older_folder(tmp_path, error, reason):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(UserError, match=reason), written_aside(out, replace=True):
        try:
            raise error
        except OSError as cause:
            raise RuntimeError("a writer's own words") from cause
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "old").exists()


@pytest.mark.parametrize(
    ("number", "file", "expected"),
    [
        (errno.EACCES, "in/config.json", "cannot read {}/in/config.json: permission denied"),
        (errno.EACCES, ".out.incomplete/x", "cannot write {}/out: permission denied; nothing was left there"),
        (errno.EACCES, ".", "cannot write {}/out: permission denied; nothing was left there"),
        (
            errno.ENOSPC,
            "in/config.json",
            "cannot write {}/out: no space left on device; nothing was left there",
        ),
    ],
)
def test_the_side_that_is_refused_is_named(tmp_path, number, file, expected):
    """Of a full disk the system names the file that was copied from, too."""
    with pytest.raises(UserError) as caught, written_aside(tmp_path / "out"):
        raise OSError(number, os.strerror(number), str(tmp_path / file))
    assert str(caught.value) == expected.format(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", "4"),
        ("num_hidden_layers", 0),
        ("hidden_size", 64.0),
        ("rms_norm_eps", "a"),
        ("rope_parameters", "x"),
        ("layer_types", 3),
        ("model_type", ["llama"]),
        ("vocab_size", True),
    ],
)
def test_a_config_value_of_the_wrong_kind_is_named(tmp_path, key, value):
    folder = write_hf(tmp_path / "hf", "llama", tied=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=rf"config.json: {key} has to be .*, not {re.escape(repr(value))}$"):
        hf_to_megatron(folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_a_folder_that_is_being_written_is_left_alone(tmp_path):
    with written_aside(tmp_path / "out") as aside:
        (aside / "mine").write_text("whole")
        with pytest.raises(UserError, match="another process is writing"), written_aside(tmp_path / "out"):
            raise AssertionError("never reached")
        with tidied(tmp_path / "out"):
            pass
        assert (aside / "mine").read_text() == "whole"
    assert (tmp_path / "out" / "mine").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no lock, no leftovers"


@pytest.mark.parametrize("name", [".", "/", "x" * 300])
def test_folders_that_cannot_be_made(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError), written_aside(Path(name)):
        raise AssertionError("never reached")
