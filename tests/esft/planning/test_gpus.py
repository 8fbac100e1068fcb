"""What several GPUs should hold of a model."""

from dataclasses import replace
from pathlib import Path

import pytest

from esft.planning.gpus import FROZEN, NOTHING, Spread, frozen_weights, spreading, spreads
from esft.planning.plan import Plan, plan
from esft.runs.config import TrainConfig

OLMOE = str(Path(__file__).parents[3] / "benchmarks" / "models" / "olmoe-1b-7b")


@pytest.fixture(scope="module")
def ours() -> Plan:
    return plan(OLMOE, config=TrainConfig(batch_size=1, dtype="bfloat16"), tokens=64)


def test_what_is_frozen_is_every_weight_that_gets_no_gradient(ours):
    assert frozen_weights(ours) == 2 * (ours.parameters - ours.trained_parameters)
    full = plan(OLMOE, config=TrainConfig(method="full", batch_size=1, dtype="bfloat16"), tokens=64)
    assert frozen_weights(full) == 0
    assert [way.peak for way in spreads(full, 8, 16)] == [full.peak] * 2


def test_replicated_weights_cost_the_gradients_and_sharded_ones_are_gathered_twice(ours):
    whole, cut = spreads(ours, 8, 16)
    frozen, gradients = frozen_weights(ours), 2 * ours.trained_parameters
    assert whole == Spread(NOTHING, ours.peak, round(2 * 7 / 8 * gradients))
    assert cut.sharded == FROZEN and cut.sent == pytest.approx(2 * 7 / 8 * (gradients + frozen))
    # An eighth is kept, and two of sixteen layers are whole at a time.
    assert cut.peak == pytest.approx(ours.peak - frozen + frozen / 8 + frozen / 8)
    assert spreads(ours, 1, 16)[1] == Spread(FROZEN, ours.peak, 0)


def test_nothing_is_sharded_that_fits_whole(ours):
    whole, cut = spreads(ours, 8, 16)
    assert spreading(ours, 8, 16, whole.peak)[-1].startswith("Shard nothing: all of the model fits")
    assert spreading(ours, 8, 16, whole.peak - 1)[-1].startswith("Shard what is frozen (--shard frozen): ")
    assert spreading(ours, 8, 16, cut.peak)[-1].startswith("Shard what is frozen (--shard frozen): ")
    assert spreading(ours, 8, 16, cut.peak - 1)[-1].startswith("It does not fit")
    lora = replace(ours, method="lora")  # which is not sharded
    assert spreading(lora, 8, 16, cut.peak)[-1].startswith("It does not fit")
    lines = spreading(ours, 8, 16, None)
    assert len(lines) == 2
    assert lines[0].startswith(f"8 GPUs, sharded nothing: {whole.peak / 1e9:.3f} GB each, ")
