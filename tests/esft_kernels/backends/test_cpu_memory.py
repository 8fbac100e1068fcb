"""Large buffers are used again once nothing holds them, and never before."""

import gc
import mmap
import os
import threading
import time

import pytest
import torch

from esft_kernels.backends import cpu_memory
from esft_kernels.backends.cpu_memory import SMALLEST, take
from tests.esft_kernels.backends.test_cpu import check
from tests.esft_kernels.layers import make_layer

LIKE = torch.empty(0, dtype=torch.bfloat16)
ROWS = SMALLEST // 2 // 64  # of 64 columns, the fewest that are large


@pytest.fixture(autouse=True)
def no_blocks_of_before(monkeypatch):
    monkeypatch.setattr(cpu_memory, "_free", [])


def given_out(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_a_plain_tensor_of_the_shape_and_dtype(dtype):
    for shape in ((ROWS, 64), (3, 5), (0, 64), (2 * ROWS, 63)):
        tensor = take(torch.empty(0, dtype=dtype), *shape)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert not tensor.requires_grad and tensor.device.type == "cpu"
        assert tensor.fill_(3).eq(3).all()


def test_what_nothing_holds_any_more_is_given_out_again():
    first = take(LIKE, ROWS, 64)
    place = given_out(first)
    del first
    assert len(cpu_memory._free) == 1
    again = take(LIKE, ROWS, 64)
    assert given_out(again) == place and not cpu_memory._free
    assert given_out(take(LIKE, ROWS, 64)) != place


@pytest.mark.parametrize("holder", [lambda t: t[5:7], lambda t: t.detach(), lambda t: t.view(-1).unbind()[3]])
def test_what_a_view_still_needs_is_not(holder):
    tensor = take(LIKE, ROWS, 64).fill_(2)
    view = holder(tensor)
    place = given_out(tensor)
    del tensor
    gc.collect()
    other = take(LIKE, ROWS, 64).fill_(9)
    assert given_out(other) != place and view.eq(2).all()
    del view
    assert given_out(take(LIKE, ROWS, 64)) == place


def test_what_a_backward_still_needs_is_not():
    weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    rows = take(LIKE, ROWS, 64).fill_(1)
    out = (rows * weight).sum(dtype=torch.float32)
    del rows
    gc.collect()
    take(LIKE, ROWS, 64).fill_(7)
    out.backward()
    assert weight.grad.eq(torch.tensor(float(ROWS), dtype=torch.bfloat16)).all()


def test_a_block_serves_sizes_down_to_half_of_its_own_and_the_nearest_is_taken():
    large, small = take(LIKE, 4 * ROWS, 64), take(LIKE, 3 * ROWS, 64)
    places = given_out(large), given_out(small)
    del large, small
    assert given_out(take(LIKE, 2 * ROWS, 64)) == places[1]
    assert given_out(take(LIKE, 4 * ROWS, 64)) == places[0]
    assert given_out(take(LIKE, ROWS, 64)) not in places


def test_there_are_never_more_blocks_than_were_in_use_at_once():
    for rows in (*range(ROWS, 12 * ROWS, 517), *range(12 * ROWS, ROWS, -517)):
        pair = take(LIKE, rows, 64), take(LIKE, rows, 64)
        del pair
    sizes = sorted(map(len, cpu_memory._free))
    assert len(sizes) <= 2 * 4  # of every size between a half and the whole one pair is enough
    assert sizes[-1] >= 11 * SMALLEST


def test_without_such_blocks_in_the_system_it_is_what_torch_makes(monkeypatch):
    monkeypatch.delattr(mmap, "MAP_ANONYMOUS")
    tensor = take(LIKE, ROWS, 64).fill_(1)
    del tensor
    assert not cpu_memory._free


@pytest.mark.parametrize("biased", [False, True])
def test_what_a_block_held_before_reaches_no_result(biased, monkeypatch):
    monkeypatch.setattr(cpu_memory, "SMALLEST", 1)
    layer = make_layer(tokens=64, experts=9, trained=(4, 1, 8), biased=biased)
    for _ in range(2):
        check(layer)
        assert cpu_memory._free
        for block in cpu_memory._free:
            torch.frombuffer(block, dtype=torch.uint8).fill_(255)  # not a number, in every float dtype


def test_a_block_serves_just_the_half_of_its_size():
    block = take(LIKE, 2 * ROWS, 64)
    place = given_out(block)
    del block
    assert given_out(take(LIKE, ROWS, 64)) == place


def test_a_new_block_takes_the_place_of_the_largest_that_is_too_small():
    held = take(LIKE, ROWS, 64), take(LIKE, 3 * ROWS, 64), take(LIKE, 2 * ROWS, 64)
    del held
    five = take(LIKE, 5 * ROWS, 64)
    assert sorted(map(len, cpu_memory._free)) == [SMALLEST, 2 * SMALLEST] and five is not None


def test_a_block_is_no_file_and_no_other_process_sees_it():
    opened = set(os.listdir("/proc/self/fd"))
    tensor = take(LIKE, ROWS, 64)
    assert set(os.listdir("/proc/self/fd")) == opened
    one = tensor.view(-1)[:1]  # of a single element: what several threads would do does not go on in a fork
    one[0] = 1
    if not (child := os.fork()):
        one[0] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert one.item() == 1


@pytest.mark.parametrize("known", [True, False])
def test_blocks_are_in_large_pages_where_the_system_knows_such(known: bool, monkeypatch):
    advised = []

    class Noted(mmap.mmap):
        def madvise(self, option: int) -> None:
            advised.append(option)

    monkeypatch.setattr(mmap, "mmap", Noted)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    if not known:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert take(LIKE, ROWS, 64).fill_(1).eq(1).all()
    assert advised == [14] * known


def test_threads_that_take_at_once_never_share_a_block(monkeypatch):
    """One thread looks through the free blocks while another one would like to."""
    held = take(LIKE, ROWS, 64)
    del held
    real, inside, most = cpu_memory._fitting, [], []

    def slow(size: int):
        inside.append(size)
        most.append(len(inside))
        time.sleep(0.02)
        try:
            return real(size)
        finally:
            inside.pop()

    monkeypatch.setattr(cpu_memory, "_fitting", slow)
    taken = []
    threads = [threading.Thread(target=lambda: taken.append(take(LIKE, ROWS, 64))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len({given_out(tensor) for tensor in taken}) == 3
