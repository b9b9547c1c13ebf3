"""The streaming conversion: the same checkpoint as megatron-core's own, from any layout back, dtypes, processes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_opd.checkpoint.checksums import HashedFile, StateChecksums
from megatron_opd.checkpoint.convert import (
    hf_to_megatron,
    megatron_to_hf,
    plan_hf_to_megatron,
    plan_megatron_to_hf,
)
from megatron_opd.checkpoint.pieces import shares
from megatron_opd.checkpoint.safetensors_files import SafetensorsFiles
from megatron_opd.checkpoint.state_read import StateReader, read_metadata
from megatron_opd.checkpoint.weights import copy_model_files, load_model_weights, sharded_weights
from megatron_opd.errors import UserError
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.gpt import build_gpt
from megatron_opd.parallel import cpu
from megatron_opd.parallel.groups import ParallelLayout, build_groups
from tests.checkpoint.models import FAMILIES, assert_identical, safetensors_of, write_hf

CASES = [(family, family in ("qwen2", "qwen3_moe")) for family in FAMILIES]


@pytest.fixture(scope="module", params=CASES, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in CASES])
def folder(request, tmp_path_factory) -> Path:
    family, tied = request.param
    return write_hf(tmp_path_factory.mktemp("hf") / "model", family, tied=tied, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("llama") / "hf", "llama", tied=False, max_shard_size="60KB")


def save_with_megatron_core(folder: Path, out: Path, layout: ParallelLayout, optimizer: bool = False) -> None:
    """On every rank of a layout: the model as megatron-core itself saves it, as a run does."""
    cpu.install()
    groups = build_groups(layout)
    arch = read_architecture(folder)
    padded = arch.padded_vocab_size(layout.tensor)
    chunks = build_gpt(arch, layout, groups, precision="bf16", padded_vocab_size=padded)
    load_model_weights(chunks, arch, folder, groups=groups, padded_vocab_size=padded)
    state: dict[str, Any] = dict(sharded_weights(chunks, {"dp_cp_group": groups.dp_cp}))
    if optimizer:
        moments = ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.embedding", torch.ones(7), replica_id=dist.get_rank()
        )
        state["optimizer"] = {"exp_avg": moments, "step": 3}
    if dist.get_rank() == 0:
        (out / "state").mkdir(parents=True)
        copy_model_files(folder, out)
    dist.barrier()
    dist_checkpointing.save(state, str(out / "state"))


def described(folder: Path) -> dict[str, object]:
    """What the metadata of a checkpoint says of every tensor, its blocks included, and of every other object."""
    return {
        key: (
            (entry.size, entry.properties, sorted((*chunk.offsets, *chunk.sizes) for chunk in entry.chunks))
            if isinstance(entry, TensorStorageMetadata)
            else type(entry)
        )
        for key, entry in read_metadata(folder / "state").state_dict_metadata.items()
    }


def test_the_checkpoint_is_described_like_megatron_cores_own(gloo, folder, tmp_path):
    gloo(1, save_with_megatron_core, folder, tmp_path / "theirs", ParallelLayout())
    hf_to_megatron(folder, tmp_path / "ours")
    assert described(tmp_path / "ours") == described(tmp_path / "theirs")
    interleaved = ParallelLayout(pipeline=2, virtual_pipeline=2)
    gloo(2, save_with_megatron_core, folder, tmp_path / "interleaved", interleaved)
    assert described(tmp_path / "ours") == described(tmp_path / "interleaved")
    for name in ("metadata.json", "common.pt"):
        ours, theirs = (tmp_path / which / "state" / name for which in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    numbers = [StateReader(tmp_path / which / "state") for which in ("ours", "theirs")]
    for key, stored in numbers[0].tensors.items():
        ours, theirs = (reader.read(key, [0] * len(stored.shape), stored.shape) for reader in numbers)
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("virtual", [1, 2])
def test_conversion_from_any_layout_gives_the_same_bits(gloo, folder, tmp_path, virtual):
    moe = read_architecture(folder).moe is not None
    others: dict[str, Any] = {"data": 2, "expert": 2} if moe else {"tensor": 2}
    layout = ParallelLayout(pipeline=2, virtual_pipeline=virtual, **others)
    gloo(4, save_with_megatron_core, folder, tmp_path / "run", layout, optimizer=True)
    megatron_to_hf(tmp_path / "run", tmp_path / "back")
    assert_identical(safetensors_of(tmp_path / "back"), safetensors_of(folder))
    carried = {path.name for path in (tmp_path / "back").iterdir()}
    assert carried == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_kept(tmp_path, dtype):
    folder = write_hf(tmp_path / "hf", "qwen2", tied=True, dtype=dtype)
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_identical(safetensors_of(tmp_path / "back"), safetensors_of(folder))
    assert f'"dtype": "{str(dtype).removeprefix("torch.")}"' in (tmp_path / "back/config.json").read_text()


@pytest.mark.parametrize(("choice", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_dtype_is_changed_when_asked(llama, tmp_path, choice, dtype):
    expected = {name: tensor.to(dtype) for name, tensor in safetensors_of(llama).items()}
    hf_to_megatron(llama, tmp_path / "changed", dtype=choice)
    megatron_to_hf(tmp_path / "changed", tmp_path / "there")
    hf_to_megatron(llama, tmp_path / "kept")
    megatron_to_hf(tmp_path / "kept", tmp_path / "back", dtype=choice)
    for out in ("there", "back"):
        assert_identical(safetensors_of(tmp_path / out), expected)
        assert str(dtype).removeprefix("torch.") in (tmp_path / out / "config.json").read_text()


def test_layers_of_different_dtypes_are_stored_in_the_wider_one(llama, tmp_path, capsys):
    folder = tmp_path / "hf"
    folder.mkdir()
    copy_model_files(llama, folder)
    tensors = {
        name: tensor if ".2.mlp.down" in name else tensor.bfloat16()
        for name, tensor in safetensors_of(llama).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    hf_to_megatron(folder, tmp_path / "megatron")
    note = (
        "note: a stored tensor holds all its layers in one dtype, here the one that changes no number: "
        "decoder.layers.mlp.linear_fc2.weight (bfloat16, float32 -> float32)"
    )
    assert capsys.readouterr().err == f"{note}\n"
    assert note in plan_hf_to_megatron(folder).describe().splitlines()
    assert plan_hf_to_megatron(folder, "bf16").note is None and plan_hf_to_megatron(llama).note is None
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    expected = {name: tensor.float() if ".mlp.down" in name else tensor for name, tensor in tensors.items()}
    assert_identical(safetensors_of(tmp_path / "back"), expected)


def test_two_half_precisions_in_one_tensor_become_fp32(llama, tmp_path):
    """Neither holds the numbers of the other: bf16 has the range, fp16 the digits."""
    folder = tmp_path / "hf"
    folder.mkdir()
    copy_model_files(llama, folder)
    tensors = {
        name: tensor.bfloat16() * 2.0**100 if ".gate_proj" in name else tensor.half()
        for name, tensor in safetensors_of(llama).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    mixed = (".gate_proj", ".up_proj")
    expected = {name: t.float() if any(part in name for part in mixed) else t for name, t in tensors.items()}
    assert_identical(safetensors_of(tmp_path / "back"), expected)


class Seen(list[tuple[int, int]]):
    """Progress as it was reported."""

    def __call__(self, done: int, total: int) -> None:
        self.append((done, total))


def convert_there_and_back(folder: Path, out: Path) -> tuple[int, Seen, Seen]:
    """On every rank: the bytes that it wrote on the way back, and the progress that it saw there and back."""
    there, back = Seen(), Seen()
    written = 0
    write = SafetensorsFiles.write

    def counted(files: SafetensorsFiles, name: str, tensor: torch.Tensor) -> None:
        nonlocal written
        written += tensor.nbytes
        write(files, name, tensor)

    hf_to_megatron(folder, out / "megatron", group=dist.group.WORLD, progress=there)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFiles, "write", counted)
        megatron_to_hf(out / "megatron", out / "back", group=dist.group.WORLD, progress=back)
    return written, there, back


def test_processes_share_the_work(gloo, llama, tmp_path):
    ranks = gloo(2, convert_there_and_back, llama, tmp_path)
    assert_identical(safetensors_of(tmp_path / "back"), safetensors_of(llama))
    hf_to_megatron(llama, tmp_path / "alone")
    assert described(tmp_path / "megatron") == described(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"megatron", "back", "alone"}
    state = tmp_path / "megatron" / "state"
    sizes = [path.stat().st_size for path in state.glob("*.distcp")]
    assert len(sizes) == 2 and max(sizes) < 0.55 * sum(sizes)
    there, back = (
        sum(plan.sizes) for plan in (plan_hf_to_megatron(llama), plan_megatron_to_hf(state.parent))
    )
    written = [rank[0] for rank in ranks]
    assert sum(written) == back and max(written) < 0.51 * back
    for _, *seen in ranks:  # each sees what both have done
        for progress, total in zip(seen, (there, StateChecksums(state).nbytes + back), strict=True):
            assert progress == sorted(progress) and progress[-1] == (total, total)
            assert progress.count((total, total)) == 1


def refused(folder: Path, target: Path, fails_on: int | None = None) -> str:
    """How a rank of several is refused; `fails_on` is a rank whose disk is full while it writes."""
    progress = None
    if fails_on == dist.get_rank():

        def progress(done: int, total: int) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError) as caught:
        convert = megatron_to_hf if (folder / "state").exists() else hf_to_megatron
        convert(folder, target, group=dist.group.WORLD, progress=progress)
    return str(caught.value)


@pytest.mark.parametrize("fails_on", [0, 1])
def test_a_full_disk_on_one_process_is_one_line_on_all(gloo, llama, tmp_path, fails_on):
    hf_to_megatron(llama, tmp_path / "megatron")
    for source in (llama, tmp_path / "megatron"):
        expected = f"cannot write {tmp_path / 'out'}: no space left on device; nothing was left there"
        assert gloo(2, refused, source, tmp_path / "out", fails_on) == [expected] * 2
        assert {path.name for path in tmp_path.iterdir()} == {"megatron"}


def test_existing_output_is_refused_on_all_processes(gloo, llama, tmp_path):
    (tmp_path / "out").mkdir()
    expected = f"{tmp_path / 'out'} exists already: remove it or choose another output folder"
    assert gloo(2, refused, llama, tmp_path / "out") == [expected] * 2


def test_a_killed_conversion_leaves_nothing_under_the_final_name(llama, tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from megatron_opd.checkpoint.convert import hf_to_megatron\n"
        "hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]),\n"
        "    progress=lambda done, total: done > total / 2 and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(llama), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {".out.incomplete", ".out.lock"}
    hf_to_megatron(llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert plan_megatron_to_hf(tmp_path / "out").pieces == plan_hf_to_megatron(llama).pieces


@pytest.mark.parametrize("writes", [1, 2, 3, 40, 41, 42])
def test_ctrl_c_is_not_taken_for_a_full_disk(llama, tmp_path, monkeypatch, writes):
    """torch's zip writer, interrupted in a write, ends with an error of its own."""
    real, calls = HashedFile.write, iter(range(writes))

    def write(file: HashedFile, data: Any) -> int:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(file, data)

    monkeypatch.setattr(HashedFile, "write", write)
    with pytest.raises(KeyboardInterrupt):
        hf_to_megatron(llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_the_architecture_lacks_is_refused(llama, tmp_path):
    hf_to_megatron(llama, tmp_path / "megatron")
    config = tmp_path / "megatron" / "config.json"
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    with pytest.raises(
        UserError, match=r"state: unexpected tensor output_layer\.weight, not part of this arch"
    ):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"megatron"}


def test_the_plan_says_what_is_written(llama, tmp_path):
    hf_to_megatron(llama, tmp_path / "megatron")
    there, back = (
        [re.sub(" +", " ", line) for line in plan.describe().splitlines()]
        for plan in (plan_hf_to_megatron(llama), plan_megatron_to_hf(tmp_path / "megatron"))
    )
    embedding = "embedding.word_embeddings.weight"
    assert back[1] == f"{embedding} [131, 64] float32 33,536 model.embed_tokens.weight"
    numbers = sum(tensor.nbytes for tensor in safetensors_of(llama).values())
    assert back[-1] == f"total: 39 Hugging Face tensors, {numbers:,} bytes"
    lines = there
    assert lines[0] == "megatron shape dtype bytes Hugging Face"
    assert lines[1] == f"{embedding} [256, 64] float32 65,536 model.embed_tokens.weight"
    up = "decoder.layers.3.mlp.linear_fc1.weight[96:192] [96, 64] float32 24,576 model.layers.3.mlp.up_proj.weight"
    assert up in lines
    total = sum(path.stat().st_size for path in (tmp_path / "megatron/state").glob("*.distcp"))
    said = int(lines[-1].split()[-2].replace(",", ""))
    assert lines[-1].startswith("total: 39 Hugging Face tensors, ") and total * 0.8 < said < total
    halved = plan_hf_to_megatron(llama, "bf16")
    assert sum(halved.sizes) * 2 == said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shares_are_complete_and_even(count):
    sizes = [(7 * n) % 31 + 1 for n in range(100)]
    dealt = shares(sizes, count)
    assert sorted(index for share in dealt for index in share) == list(range(100))
    sums = [sum(sizes[index] for index in share) for share in dealt]
    assert max(sums) - min(sums) <= max(sizes)
    assert shares([], 2) == [[], []]
