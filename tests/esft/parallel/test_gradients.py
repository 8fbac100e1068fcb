"""How gradients are laid together to travel; that they arrive is in ``test_ranks``."""

import torch

from esft.parallel import gradients


def test_buckets_hold_neighbours_of_one_dtype_and_no_more_than_their_size(monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET", 24)
    sizes = [(2, torch.float32), (4, torch.float32), (1, torch.float32), (3, torch.bfloat16), (2, torch.bfloat16)]
    sizes += [(50, torch.bfloat16), (1, torch.bfloat16)]
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in sizes]
    found = list(gradients._buckets(tensors))
    assert [[t.numel() for t in bucket] for bucket in found] == [[2, 4], [1], [3, 2], [50], [1]]
    assert [id(t) for bucket in found for t in bucket] == [id(t) for t in tensors]
    assert list(gradients._buckets([])) == []
