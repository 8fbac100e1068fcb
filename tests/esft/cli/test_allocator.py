"""Freed memory is kept where there is plenty, and given back where there is not."""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from esft import memory
from esft.cli import allocator
from esft.cli.allocator import PLENTY, settle_memory

# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of glibc's malloc.h.
KEPT = [(-1, -1), (-4, 0)]  # never trim, and map nothing on its own
GIVEN_BACK = [(-3, 4 * 1024 * 1024)]


@pytest.fixture
def told(monkeypatch):
    calls = []
    libc = SimpleNamespace(mallopt=lambda *values: calls.append(values))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "x")  # so that it is put back
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    return calls


@pytest.fixture
def model(tmp_path):
    """Weights of 3,000 bytes, and other files."""
    (tmp_path / "a.safetensors").write_bytes(bytes(1000))
    (tmp_path / "b.safetensors").write_bytes(bytes(2000))
    (tmp_path / "tokenizer.json").write_bytes(bytes(50_000))
    return str(tmp_path)


def settled(free: int, monkeypatch, **args) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    settle_memory(argparse.Namespace(**args))


def test_it_is_kept_where_the_weights_are_a_small_part_of_what_is_free(told, model, monkeypatch):
    settled(PLENTY * 3000, monkeypatch, model=model)
    assert told == KEPT and "THP_MEM_ALLOC_ENABLE" not in os.environ


def test_it_is_given_back_in_large_blocks_where_they_are_not(told, model, monkeypatch):
    settled(PLENTY * 3000 - 1, monkeypatch, model=model, frozen="auto")
    assert told == GIVEN_BACK and os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    settled(0, monkeypatch, model=model)
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"  # what the user has set stays


@pytest.mark.parametrize(("frozen", "bits"), [("nf4", 4.5), ("int8", 8.5), ("bf16", 16), ("auto", 16)])
def test_weights_in_few_bits_count_as_what_they_take(frozen, bits, told, model, monkeypatch):
    settled(round(PLENTY * 3000 * bits / 16) + 1, monkeypatch, model=model, frozen=frozen)
    assert told == KEPT
    told.clear()
    settled(round(PLENTY * 3000 * bits / 16) - 1, monkeypatch, model=model, frozen=frozen)
    assert told == GIVEN_BACK


def test_weights_that_cannot_be_looked_at_are_told_of_by_who_reads_them(told, model, monkeypatch):
    for name, to in (("c", "nowhere"), ("d", "d.safetensors")):
        (Path(model) / f"{name}.safetensors").symlink_to(to)
    settled(PLENTY * 3000 - 1, monkeypatch, model=model)
    assert told == GIVEN_BACK


@pytest.mark.parametrize("args", [{}, {"model": None}, {"model": "hub/name"}], ids=str)
def test_a_stage_whose_weights_are_not_known_keeps_it(args, told, monkeypatch):
    settled(0, monkeypatch, **args)
    assert told == KEPT


def test_where_the_system_cannot_be_told_nothing_is_done(told, model, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace())
    settled(0, monkeypatch, model=model)
    monkeypatch.setattr(allocator.sys, "platform", "win32")
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    settled(0, monkeypatch, model=model)
    assert told == [] and "THP_MEM_ALLOC_ENABLE" not in os.environ
