"""megatron-core without CUDA: the adaptation refuses unknown versions, undoes itself, names stale entries."""

import pytest
import torch
from megatron.core import package_info

from megatron_opd.errors import UserError
from megatron_opd.parallel import cpu

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the adaptation is for machines without CUDA"
)


@pytest.fixture(autouse=True)
def _uninstalled():
    cpu.uninstall()
    yield
    cpu.uninstall()
    cpu.install()


def test_install_makes_cuda_calls_mean_cpu_and_uninstall_restores_them():
    before = torch.cuda.current_device
    assert cpu.install() is True
    assert torch.cuda.current_device() == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    cpu.uninstall()
    assert torch.cuda.current_device is before


def test_unchecked_megatron_core_is_refused(monkeypatch):
    monkeypatch.setattr(package_info, "__version__", "0.99.0")
    with pytest.raises(UserError, match=r"megatron-core 0\.99\.0 was not checked"):
        cpu.install()


def test_entry_without_cuda_literal_is_named(monkeypatch):
    stale = {"megatron.core.utils": ("divide",)}
    monkeypatch.setattr(cpu, "_CUDA_LITERALS", stale)
    with pytest.raises(AssertionError, match=r"megatron\.core\.utils\.divide holds no CUDA literal"):
        cpu.install()


def test_nothing_is_touched_where_cuda_exists(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    assert cpu.install() is False
    assert torch.cuda.current_device is before
