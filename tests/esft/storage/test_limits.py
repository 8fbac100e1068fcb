from esft.checkpoint.source import check_numbers
from esft.storage.limits import EXPERTS, EXPERTS_IN_ALL, LAYERS, SIZE
from esft.storage.reading import key_number


def test_what_exists_is_far_below():
    """The largest of each among published models, as their configurations have it."""
    check_numbers({"num_hidden_layers": 126, "n_routed_experts": 512, "vocab_size": 262_144}, "it")
    assert LAYERS > 126 * 50 and EXPERTS > 512 * 100 and SIZE > 262_144 * 50 and EXPERTS_IN_ALL > 61 * 384 * 40


def test_a_layers_or_an_experts_number_is_below_its_limit():
    assert key_number(str(LAYERS - 1), LAYERS) == LAYERS - 1 and key_number(str(LAYERS), LAYERS) is None
