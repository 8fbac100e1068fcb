"""Gradients of several ranks, added up."""

import os

import torch
from torch import nn

from esft.parallel import gradients
from esft.parallel.join import joined
from tests.esft.parallel.jobs import job


def summed() -> list:
    """Gradients that are there on some ranks only, in buckets of at most 16 bytes."""
    gradients.BUCKET, rank = 16, int(os.environ["RANK"])
    like = {"a": torch.zeros(2), "b": torch.zeros(2), "none": torch.zeros(1), "half": torch.zeros(1).bfloat16()}
    like |= {"large": torch.zeros(5, 3), "turned": torch.zeros(3, 2)}
    parameters = {name: nn.Parameter(t) for name, t in like.items()}
    for name, p in parameters.items():
        if name != "none" and not (name == "b" and rank != 1):
            p.grad = torch.full_like(p, rank + 1.0)
    parameters["turned"].grad = torch.arange(6.0).view(2, 3).T
    with joined():
        gradients.add_up(list(parameters.values()))
    return [None if p.grad is None else p.grad.tolist() for p in parameters.values()]


def test_every_rank_gets_the_sum_of_those_that_have_a_gradient(tmp_path):
    ended = job(tmp_path, 3, summed)
    expected = [[6, 6], [2, 2], None, [6], [[6, 6, 6]] * 5, [[0, 9], [3, 12], [6, 15]]]
    assert [(e.status, e.value) for e in ended] == [(0, expected)] * 3, ended


def test_buckets_hold_neighbours_of_one_dtype_and_no_more_than_25_mib():
    mib = 1 << 20
    sizes = {torch.float32: [5 * mib, 20 * mib, 4], torch.bfloat16: [10 * mib, 15 * mib, 80 * mib, 2]}
    tensors = [
        torch.empty(nbytes // dtype.itemsize, dtype=dtype, device="meta")
        for dtype, each in sizes.items()
        for nbytes in each
    ]
    found = list(gradients._buckets(tensors))
    assert [[t.nbytes for t in bucket] for bucket in found] == [
        [5 * mib, 20 * mib], [4], [10 * mib, 15 * mib], [80 * mib], [2],
    ]  # fmt: skip
    assert [id(t) for bucket in found for t in bucket] == [id(t) for t in tensors]
    assert list(gradients._buckets([])) == []
