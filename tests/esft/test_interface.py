import pytest
import torch
from esft.families import moe_layers

from tests.esft import zoo


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "muse_spark"])
def test_slots_of_another_ranks_experts_add_nothing_and_get_no_gradient(family: str):
    model = zoo.tiny(family)
    model.set_experts_implementation("esft")
    experts = moe_layers(model)[0].experts
    experts._is_expert_parallel = True
    d = experts.down_proj.shape[2 if getattr(experts, "is_transposed", False) else 1]
    x, weights = torch.randn(5, d, requires_grad=True), torch.rand(5, 3, requires_grad=True)
    index = torch.tensor([[0, 3, 8], [8, 8, 8], [8, 1, 0], [2, 3, 4], [8, 0, 8]])
    here = index < 8
    out = experts(x, index, weights)
    out.sum().backward()
    # The same rows with the other rank's slots left out, one token at a time.
    for t in range(5):
        if not here[t].any():
            assert not out[t].count_nonzero()
            assert not x.grad[t].count_nonzero()
            continue
        alone = experts(x[t : t + 1].detach(), index[t : t + 1, here[t]], weights[t : t + 1, here[t]].detach())
        torch.testing.assert_close(out[t], alone[0], atol=1e-6, rtol=1e-5)
    assert not weights.grad[~here].count_nonzero()
    assert weights.grad[here].count_nonzero() == here.sum()


def test_inference_keeps_nothing_for_a_backward():
    model = zoo.tiny("mixtral")
    model.set_experts_implementation("esft")
    with torch.no_grad():
        out = model(input_ids=zoo.tokens()).logits
    assert not out.requires_grad
    model.requires_grad_(False)
    assert not model(input_ids=zoo.tokens()).logits.requires_grad
