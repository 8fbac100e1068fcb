import pytest

from esft.checkpoint.source import check_numbers
from esft.storage.limits import (
    ENCODING,
    EXPERTS,
    EXPERTS_IN_ALL,
    JSON_BYTES,
    LAYERS,
    RENDERED,
    SETTINGS_BYTES,
    SHOWN,
    SIZE,
    TEXT,
    UNFOLDED,
)
from esft.storage.reading import key_number

LINE = '    "model.layers.60.mlp.experts.383.down_proj.weight_scale_inv": "model-00163-of-00163.safetensors",\n'


def test_what_exists_is_far_below():
    """The largest of each among published models, as their configurations have it."""
    check_numbers({"num_hidden_layers": 126, "n_routed_experts": 512, "vocab_size": 262_144}, "it")


@pytest.mark.parametrize(
    ("limit", "largest", "times"),
    [
        (JSON_BYTES, len(LINE) * 10**6, 2),  # the index of a million tensors
        (SETTINGS_BYTES, 50 * 80, 16),  # a page of settings
        (LAYERS, 126, 3),
        (EXPERTS, 512, 100),
        (EXPERTS_IN_ALL, 61 * 384, 40),
        (SIZE, 262_144, 50),
        (SHOWN, 40, 2),  # a long name
        (ENCODING, 0.2, 100),  # a conversation of thousands of turns
        (RENDERED, TEXT, 64),
        (UNFOLDED, 20, 10),  # repetitive text
    ],
)
def test_a_limit_leaves_room_and_not_twice_as_much(limit, largest, times):
    assert times * largest <= limit < 2 * times * largest


def test_a_layers_or_an_experts_number_is_below_its_limit():
    assert key_number(str(LAYERS - 1), LAYERS) == LAYERS - 1 and key_number(str(LAYERS), LAYERS) is None
