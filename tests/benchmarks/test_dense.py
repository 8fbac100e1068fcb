import pytest
import torch

from benchmarks import dense
from benchmarks.dense import flops_per_token
from esft.selection import ExpertSelection
from tests.esft.models import save_tiny, tiny_model


def test_flops_are_two_a_weight_forward_and_backward_and_two_a_trained_one(tmp_path):
    base = save_tiny(tmp_path / "base")
    model = tiny_model()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    others = sum(sizes.values()) - experts - sizes["model.embed_tokens.weight"]
    active = experts * model.config.num_experts_per_tok / 8
    frozen = flops_per_token(str(base), ExpertSelection({}))
    assert frozen == pytest.approx(4 * (others + active))
    every = flops_per_token(str(base), ExpertSelection({1: list(range(8)), 2: list(range(8))}))
    assert every == pytest.approx(frozen + 2 * active)


def test_a_dense_rate_is_of_products():
    assert 1e8 < dense.dense_rate(256, 0.05) < 1e16


def test_the_head_counts_for_the_tokens_that_it_sees_tied_or_not(tmp_path):
    found = {}
    for tied in (False, True):
        tiny_model(tie_word_embeddings=tied).save_pretrained(base := tmp_path / str(tied))
        found[tied] = [flops_per_token(str(base), ExpertSelection({}), share) for share in (0.0, 0.5, 1.0)]
    head = tiny_model().lm_head.weight.numel()
    assert found[True] == found[False]
    assert [flops - found[True][0] for flops in found[True]] == [0, 2 * head, 4 * head]


def test_trained_shared_experts_count(tmp_path):
    base = save_tiny(tmp_path / "base")
    shared = sum(p.numel() for name, p in tiny_model().named_parameters() if ".shared_experts." in name)
    alone, with_shared = (
        flops_per_token(str(base), ExpertSelection({1: [0]}, shared_experts=s)) for s in (False, True)
    )
    assert shared and with_shared - alone == 2 * shared


def test_dense_products_are_as_many_as_are_asked_for(monkeypatch):
    done = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append(2 * a.shape[0] * a.shape[1] * b.shape[1]))
    dense.dense_products(1e9, torch.device("cpu"))()
    assert done == [pytest.approx(1e9, rel=0.01)]
