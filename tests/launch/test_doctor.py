"""What the doctor finds around a run: ranks and their connections, disk, ports, servers, and what it says of them."""

from __future__ import annotations

import json
import socket
import sys
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opd.config.load import load_config
from megatron_opd.config.rollout import SGLangConfig
from megatron_opd.errors import UserError
from megatron_opd.launch import connections, started, surroundings
from megatron_opd.launch.check import MISSING, NOTE, OK
from megatron_opd.launch.connections import Link, Measured, checks_of, measure
from megatron_opd.launch.started import Meeting, Place, first_host, meeting, place_of
from tests.rollout.fake_server import server
from tests.test_train import inputs, write_config

__all__ = ["inputs"]


def measure_small(nodes: list[str]) -> Measured:
    connections.MESSAGE_BYTES["gloo"] = 1 << 14
    return measure(nodes, "gloo", torch.device("cpu"))


def test_all_pairs_of_nodes_and_one_within_each_are_measured(gloo):
    for measured in gloo(4, measure_small, ["a", "a", "b", "c"]):
        assert measured.right and measured.ranks == 4 and measured.speed > 0
        assert sorted(link.ends for link in measured.links) == ["a - b", "a - c", "b - c", "within a"]
        assert all(link.speed > 0 and link.latency > 0 for link in measured.links)


@pytest.mark.parametrize("count", range(1, 9))
def test_every_node_meets_every_other_once_and_one_at_a_time(count):
    rounds = connections._between_nodes([f"node{rank // 2}" for rank in range(2 * count)])
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == list(combinations(range(0, 2 * count, 2), 2))
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)


def test_slow_pairs_of_nodes_are_pointed_out():
    links = [Link(f"a - {i}", 10.0, 5.0, within=False) for i in range(8)]
    lines = list(checks_of(Measured(True, 9, 3.0, [*links, Link("b - c", 1.0, 50.0, within=False)]), "nccl"))
    assert [line.name for line in lines[:2]] == ["nccl all-reduce", "nccl b - c"]
    assert lines[1].state == NOTE and "NCCL_IB_HCA" in lines[1].remedy
    assert all(line.state == OK for line in lines[2:]) and len(lines) == 5
    fast = [Link("within a", 100.0, 1.0, within=True), Link("a - b", 1.0, 9.0, within=False)]
    assert all(line.state == OK for line in checks_of(Measured(True, 2, 1.0, fast), "gloo"))


def test_the_place_of_a_started_process():
    slurm = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "n[07-08]",
        "SLURM_JOB_ID": "9",
        "SLURM_STEP_ID": "0",
    }
    place = place_of(slurm)
    assert place is not None and (place.rank, place.size, place.local_rank) == (3, 4, 1)
    assert place.address == "n07" and 20000 <= place.port < 40000
    own = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "there", "MASTER_PORT": "5", "LOCAL_RANK": "0"}
    assert place_of({**slurm, **own}) == Place(1, 2, 0, "there", 5)
    assert place_of({}) is None and place_of({**slurm, "SLURM_STEP_NUM_TASKS": "1"}) is None
    with pytest.raises(UserError, match="MASTER_ADDR: not set, though RANK is"):
        place_of({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("node[03,07-09]-ib,login", "node03-ib"),
        ("r[1-2]n[004-008]", "r1n004"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_ranks_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(started, "PATIENCE", timedelta(seconds=0.2))
    store = dist.HashStore()
    store.set("1/1", json.dumps("here"))
    with pytest.raises(UserError, match="of 3 ranks 2 did not come to master:1"):
        Meeting(Place(0, 3, 0, "master", 1), store).gather("here")


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT: rank 0 cannot listen at 127.0.0.1:{port}"):
            meeting(Place(0, 2, 0, "127.0.0.1", port)).__enter__()


def test_the_layout_the_space_and_the_servers_of_a_run(inputs, tmp_path):
    def found(**changes):
        checks = surroundings.layout_checks(
            load_config(write_config(inputs, tmp_path / "run", **changes)), 1, 1
        )
        return {check.name: check for check in checks}

    fits = found()
    assert fits["configuration"].state == fits["run_dir, space"].state == OK
    assert "parallel" in found(parallel__tensor=3)["configuration"].remedy
    assert found(checkpoint__keep_last=10**9)["run_dir, space"].state == MISSING
    served = {"rollout__engine": "sglang", "rollout__sglang": {"python": sys.executable, "servers": 2}}
    lines = found(**served)
    assert "no SGLang" in lines["rollout.sglang.python"].remedy
    assert lines["rollout.sglang, ports"].state == OK and ", " in lines["rollout.sglang, ports"].found
    elsewhere = SGLangConfig(python=Path(sys.executable), host="203.0.113.1")
    assert surroundings._server_ports("rollout.sglang", elsewhere).state == MISSING


def test_the_disk_is_tried(tmp_path):
    speed = surroundings.disk_speed(tmp_path / "not" / "there", 1 << 20)
    assert speed["write"] > 0 and speed["read"] > 0 and not list(tmp_path.iterdir())
    assert "writes" in surroundings.disk_check({"a": speed}).found
    refused = surroundings.disk_check({"a": speed, "b": {"refused": "read-only file system"}})
    assert refused.state == MISSING and "b: read-only file system" in refused.remedy
    slow = surroundings.disk_check({"a": speed | {"write": 0.01}, "b": {"write": 9.0, "read": 9.0}})
    assert slow.state == NOTE and "on a, the slowest of 2" in slow.found


def test_a_file_that_does_not_come_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(surroundings, "SEEN_WITHIN", 0.3)
    assert surroundings.sees(tmp_path) and not surroundings.sees(tmp_path / "token")


def test_servers_that_run_already_say_what_they_serve(inputs, tmp_path):
    answers: dict[str, dict[str, Any]] = {
        "/model_info": {"model_path": "served", "weight_version": "3", "architectures": ["Qwen3ForCausalLM"]},
        "/server_info": {"version": "0.5.23"},
    }

    def reply(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if path not in answers:
            return 401, b"no key"
        return 200, json.dumps(answers[path]).encode()

    with server(reply) as (url, _):
        closed = "http://127.0.0.1:9"
        rollouts = {"rollout__engine": "sglang", "rollout__sglang": {"urls": [url, closed]}}
        config = load_config(write_config(inputs, tmp_path / "run", **rollouts))
        there, silent = surroundings.reach(config)
        assert (there.state, there.found) == (OK, "SGLang 0.5.23, served, weights 3")
        assert silent.state == MISSING and "SGLANG_API_KEY" in silent.remedy
        answers["/model_info"]["architectures"] = ["LlamaForCausalLM"]
        assert "the student is Qwen3ForCausalLM" in surroundings.reach(config)[0].remedy
        teacher = {
            "teacher__engine": "sglang",
            "teacher__sglang": {"urls": [url]},
            "objective__preset": "opd",
        }
        config = load_config(write_config(inputs, tmp_path / "run", **teacher))
        assert "serves LlamaForCausalLM, but teacher.path" in surroundings.reach(config)[0].remedy
