"""Every family of models where the GPU is: swapped, it computes what the stock model does there."""

import pytest
import torch

from esft.experts.moe_layers import moe_layers
from esft.experts.pooled_experts import PROJECTIONS
from tests.esft import zoo
from tests.esft.experts.test_moe_layers import FAMILIES, TRITON, names_of, selection, swapped
from tests.esft_kernels.layers import assert_close
from tests.gpu.device import DEVICE, sized


def output(model) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    out = model(input_ids=zoo.tokens().to(DEVICE), use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("family", sized(FAMILIES, TRITON[-2:]))
def test_logits_and_gradients_of_the_selected_experts_equal_the_stock_models(family):
    stock, ours = zoo.tiny(family).to(DEVICE), zoo.tiny(family).to(DEVICE)
    stock.set_experts_implementation("eager")
    chosen = selection(stock)
    swapped(ours, chosen, "triton")
    expected, found = output(stock), output(ours)
    assert_close(found, expected, 1e-3, "logits")
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    expected.backward(gradient)
    found.backward(gradient)
    compared = 0
    for their, our in zip(moe_layers(stock), moe_layers(ours), strict=True):
        ids = chosen.experts.get(our.index, [])
        for name, own in zip(names_of(their), PROJECTIONS, strict=False):
            of_all, of_ours = getattr(their.experts, name).grad, getattr(our.experts, f"trained_{own}").grad
            if of_all is not None and ids:
                assert_close(of_ours, of_all[ids], 1e-3, f"{their.name}.{name}")
                compared += bool(of_all[ids].count_nonzero())
    assert compared
