"""Hardware files: those that come with the package, and a user's own, whose mistakes are one line."""

from pathlib import Path

import pytest

from megatron_opd.errors import UserError
from megatron_opd.plan.hardware import known_hardware, load_hardware

OWN = """
name: mine
kernels: torch
memory: 24
reserve: 2
peak: {bf16: 100, fp32: 30}
achieved: 0.5
memory_bandwidth: 900
memory_achieved: 0.7
launch: 5
devices_per_node: 2
within_node: {bandwidth: 20, latency: 10}
between_nodes: {bandwidth: 1, latency: 50}
"""


def test_the_shipped_files() -> None:
    assert {"a100-80gb", "b200", "cpu-2-cores", "h100-80gb", "h200-141gb"} == set(known_hardware())
    devices = [load_hardware(name) for name in known_hardware()]
    assert len({device.name for device in devices}) == len(devices)
    assert all(device.within_node.bandwidth >= device.between_nodes.bandwidth for device in devices)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(OWN)
    assert load_hardware(str(file)).usable == 22 * 2**30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            OWN.replace("achieved: 0.5", "achieved: 1.5", 1),
            "achieved: Input should be less than or equal to 1",
        ),
        (OWN.replace("memory: 24", "memroy: 24"), "memory: Field required"),
        (
            OWN.replace("within_node: {bandwidth: 20, latency: 10}", "within_node: {latency: 10}"),
            "within_node.bandwidth",
        ),
        ("{", "not valid YAML"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        load_hardware(str(file))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="h1000 is no file and none of a100-80gb, b200"):
        load_hardware("h1000")
