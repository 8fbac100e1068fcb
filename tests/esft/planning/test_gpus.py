"""What several GPUs should hold of a model."""

from dataclasses import replace
from pathlib import Path

import pytest

from esft.planning.gpus import ALL, EXPERTS, FROZEN, NOTHING, Spread, frozen_weights, spreading, spreads
from esft.planning.outline import outline
from esft.planning.plan import Plan, plan
from esft.runs.config import TrainConfig

OLMOE = str(Path(__file__).parents[3] / "benchmarks" / "models" / "olmoe-1b-7b")
WHOLE = outline(OLMOE, "bfloat16")


@pytest.fixture(scope="module")
def ours() -> Plan:
    return plan(OLMOE, config=TrainConfig(batch_size=1, dtype="bfloat16"), tokens=64)


def test_what_is_frozen_is_every_weight_that_gets_no_gradient(ours):
    assert frozen_weights(ours) == 2 * (ours.parameters - ours.trained_parameters)
    full = plan(OLMOE, config=TrainConfig(method="full", batch_size=1, dtype="bfloat16"), tokens=64)
    assert frozen_weights(full) == full.outside == 0
    assert [way.peak for way in spreads(full, 8, WHOLE)[:2]] == [full.peak] * 2


def test_replicated_weights_cost_the_gradients_and_sharded_ones_are_gathered_twice(ours):
    whole, cut, *_ = spreads(ours, 8, WHOLE)
    # Embeddings, head and the last norm stay whole.
    assert (WHOLE.depth, ours.outside) == (16, 2 * (2 * 50304 * 2048 + 2048))
    layers, gradients = frozen_weights(ours) - ours.outside, 2 * ours.trained_parameters
    assert whole == Spread(NOTHING, ours.peak, round(2 * 7 / 8 * gradients))
    assert cut.sharded == FROZEN and cut.sent == pytest.approx(2 * 7 / 8 * (gradients + layers))
    # An eighth is kept, and two of sixteen layers are whole at a time.
    assert cut.peak == pytest.approx(ours.peak - layers + layers / 8 + layers / 8)
    assert spreads(ours, 1, WHOLE)[1] == Spread(FROZEN, ours.peak, 0)


def test_embeddings_in_few_bits_are_counted_as_such():
    config = TrainConfig(batch_size=1, dtype="bfloat16", frozen_linear="int8")
    packed = plan(OLMOE, config=config, tokens=64)
    embeddings = 50304 * 2048
    assert 2 * embeddings + embeddings < packed.outside < 2 * embeddings + 1.1 * embeddings  # the head is not packed


def test_dealt_experts_are_held_once_by_all_and_their_tokens_are_sent(ours):
    *_, dealt, _ = spreads(ours, 8, WHOLE)
    # 16 layers of 64 experts, 3 x 2048 x 1024 parameters each, of bf16; 8 a token.
    assert dealt.sharded == EXPERTS and ours.gradients == ours.trained_experts
    assert dealt.sent == 7 * 64 * 16 * (4 * 2048 * 2 + 16 * 8)
    experts = 16 * 64 * 3 * 2048 * 1024 * 2 + ours.masters + ours.moments
    more = 7 * 64 * 2 * 2048 * (16 + 8)
    assert dealt.peak == pytest.approx(ours.peak - experts * 7 / 8 + more)
    assert spreads(ours, 1, WHOLE)[2] == Spread(EXPERTS, ours.peak, 0)


def test_with_dealt_experts_the_other_frozen_weights_are_cut_up_as_all_are_without(ours):
    *_, dealt, both = spreads(ours, 8, WHOLE)
    layers = frozen_weights(ours) - ours.outside - ours.frozen_experts
    assert 0 < layers < ours.frozen_experts and both.sharded == ALL
    assert both.sent == pytest.approx(dealt.sent + 2 * 7 / 8 * layers)
    assert both.peak == pytest.approx(dealt.peak - layers + layers / 8 + layers / 8)
    assert spreads(ours, 1, WHOLE)[3] == Spread(ALL, ours.peak, 0)


def test_nothing_is_sharded_that_fits_whole_and_else_what_sends_least(ours):
    whole, cut, dealt, both = spreads(ours, 8, WHOLE)
    assert both.peak < dealt.peak < cut.peak < whole.peak and dealt.sent < both.sent < cut.sent
    assert spreading(ours, 8, WHOLE, whole.peak)[-1].startswith("Shard nothing: all of the model fits")
    for memory in (whole.peak - 1, dealt.peak):
        assert spreading(ours, 8, WHOLE, memory)[-1].startswith("Shard the experts (--shard experts): ")
    for memory in (dealt.peak - 1, both.peak):
        assert spreading(ours, 8, WHOLE, memory)[-1].startswith(
            "Shard the experts and what else is frozen (--shard all): "
        )
    assert spreading(ours, 8, WHOLE, both.peak - 1)[-1].startswith("It does not fit")
    # So many tokens that they weigh more than the weights.
    many = replace(ours, tokens=1 << 20)
    _, cut, dealt, _ = spreads(many, 8, WHOLE)
    assert cut.sent < dealt.sent
    assert spreading(many, 8, WHOLE, cut.peak)[-1].startswith("Shard what is frozen (--shard frozen): ")
    lora = replace(ours, method="lora")  # which is not sharded
    assert spreading(lora, 8, WHOLE, cut.peak)[-1].startswith("It does not fit")
    kept = plan(OLMOE, config=TrainConfig(batch_size=1, dtype="bfloat16", kl_weight=0.1), tokens=64)
    assert kept.kept_base == kept.gradients and frozen_weights(kept) == frozen_weights(ours)
    least = min(way.peak for way in spreads(kept, 8, WHOLE))
    assert spreading(kept, 8, WHOLE, least)[-1].startswith("It does not fit")  # nor is what keeps its base
    lines = spreading(ours, 8, WHOLE, None)
    assert len(lines) == 4
    assert lines[0].startswith(f"8 GPUs, sharded nothing: {whole.peak / 1e9:.3f} GB each, ")
