"""What memory is there, and what is said where it is not enough."""

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

import esft
from esft import memory
from esft.checkpoint.load import load_model
from esft.experts.pooled_experts import Experts
from esft.memory import check_fits, free_memory, memory_watched, peak_memory, peak_rss
from esft.selection import ExpertSelection
from esft.swapping.load_state import is_pool
from tests.esft.models import save_tiny

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 30 bytes free and 12 of swap; the folder of its control groups, of which the process has none."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=30, free=1))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=12))
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    return tmp_path


@pytest.mark.parametrize(
    ("own", "folder", "limit", "used"),
    [
        ("0::/a/b", "a/b", "memory.max", "anon"),
        ("0::/a/b", ".", "memory.max", "anon"),  # what a container sees as the root
        ("9:cpu:/\n4:memory:/a\n0::/", "memory/a", "memory.limit_in_bytes", "total_rss"),
        ("9:cpu:/\n4:memory:/a\n0::/", "memory", "memory.limit_in_bytes", "total_rss"),
    ],
)
def test_what_is_free_is_the_systems_or_what_the_control_group_has_left(own, folder, limit, used, machine):
    assert free_memory() == 42
    (machine / "own").write_text(f"{own}\n")
    assert free_memory() == 42
    group = machine / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.stat").write_text(f"cache 1000\n{used} 5\nfile 2000\n")
    for text, free in (("max\n", 42), ("25\n", 20), ("2500\n", 42)):
        (group / limit).write_text(text)
        assert free_memory() == free
    (group / "memory.stat").write_text("cache 1000\n")
    (group / limit).write_text("25\n")
    assert free_memory() == 42


def test_weights_that_cannot_be_in_the_memory_are_refused_with_a_way_out(machine, monkeypatch):
    check_fits("base", 42)
    monkeypatch.setattr(memory, "free_memory", lambda: 21_400_000_000)
    with pytest.raises(esft.OutOfMemory) as error:
        check_fits("base", 31_410_000_000)
    said, way_out = str(error.value).split("; ")
    assert said == "base: its weights take 31.4 GB, and 21.4 GB are free"
    assert way_out == "esft plan --model base --memory-gb 21 says what to change"


@pytest.mark.parametrize("how", [{}, {"frozen": "nf4"}, {"frozen": "bf16"}], ids=str)
def test_a_model_too_large_is_not_loaded(how, tmp_path, monkeypatch):
    base = str(save_tiny(tmp_path / "base"))
    model = esft.load(base, ExpertSelection({}), **how)
    wanted = sum(p.nbytes for name, p in model.named_parameters() if is_pool(name))
    monkeypatch.setattr(memory, "free_memory", lambda: wanted // 2)
    with pytest.raises(esft.OutOfMemory, match="base: its weights take .* GB, and .* GB are free; esft plan"):
        esft.load(base, ExpertSelection({}), **how)
    with pytest.raises(esft.OutOfMemory, match="base: its weights take"):
        load_model(base)
    monkeypatch.undo()
    assert load_model(base) is not None


@pytest.mark.parametrize(
    ("error", "more"),
    [
        (RuntimeError(CPU), ": 4,611,686,018,427,387,904 bytes more were asked for"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0"), ": 1,610,612,736 bytes more"),
        (torch.OutOfMemoryError("Tried to allocate 20.00 MiB."), ": 20,971,520 bytes more"),
        (torch.OutOfMemoryError("Tried to allocate 3.00 KiB."), ": 3,072 bytes more"),
        (MemoryError(), "; esft plan --model base"),
    ],
    ids=["cpu", "cuda", "mebibytes", "kibibytes", "python"],
)
def test_an_allocation_that_fails_names_the_tensor_and_what_was_asked_for(error, more):
    with pytest.raises(esft.OutOfMemory) as found, memory_watched("base") as reads:
        for name, _ in reads([("a", 1), ("b", 2), ("c", 3)]):
            if name == "b":
                raise error
    said = str(found.value)
    assert said.startswith(f"base: memory ran out at tensor b{more}") and "esft plan --model base --memory-gb " in said
    assert found.value.__cause__ is error
    with pytest.raises(esft.OutOfMemory, match=r"^base: memory ran out[:;]"), memory_watched("base"):
        raise error


def test_other_errors_stay_what_they_are():
    for kind in (RuntimeError, ValueError, OSError):
        with pytest.raises(kind, match="^something else$") as found, memory_watched("base"):
            raise kind("something else")
        assert not isinstance(found.value, esft.OutOfMemory)


def test_a_real_allocation_that_fails_is_one_of_these():
    with pytest.raises(esft.OutOfMemory, match="4,611,686,018,427,387,904 bytes more"), memory_watched("base"):
        torch.empty(1 << 62, dtype=torch.uint8)


def test_while_a_model_is_loaded_the_tensor_is_named(tmp_path, monkeypatch):
    base = str(save_tiny(tmp_path / "base"))

    def write(*_):
        raise RuntimeError(CPU)

    monkeypatch.setattr(Experts, "write_one", write)
    with pytest.raises(esft.OutOfMemory, match=r"memory ran out at tensor model\.layers\.\d\.mlp\.experts\."):
        esft.load(base, ExpertSelection({}), frozen="nf4")


def test_the_memory_of_all_gpus_counts_and_no_gpu_has_none(monkeypatch):
    taken = {0: 5, 1: 100, 2: 30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: taken[device])
    for count, usable, most in ((0, True, 0), (1, True, 5), (3, True, 135), (3, False, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=usable and count > 0: has)
        monkeypatch.setattr(torch.cuda, "device_count", lambda number=count: number)
        assert peak_memory() == most


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_largest_resident_memory_is_in_bytes_on_every_system(monkeypatch, system: str, unit: int):
    used = SimpleNamespace(RUSAGE_SELF=5, getrusage=lambda who: SimpleNamespace(ru_maxrss=300 + who))
    monkeypatch.setitem(sys.modules, "resource", used)
    monkeypatch.setattr(sys, "platform", system)
    assert peak_rss() == 305 * unit
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert peak_rss() == 0
