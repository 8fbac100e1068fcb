from dataclasses import replace

from esft.planning.advice import advice, described, fitting
from esft.planning.plan import Plan
from esft.runs.config import TrainConfig

GIB = 10**9
SOME = Plan(
    method="esft", frozen="bf16", frozen_linear="bf16", optimizer="adamw", recompute="none", records=8,
    tokens=2048, assumed=5, parameters=1000, trained_parameters=50, trained_experts=1, frozen_experts=2,
    other_weights=3, kept_base=0, outside=1, masters=4, moments=5,
    gradients=6, activations=7, step=8, base=9, peak=32, stored=11,
)  # fmt: skip


def planned(config: TrainConfig, frozen: str, tokens: int) -> Plan:
    """10 of weights (linear layers in int8 save 1), 8 of moments and 6 of activations, in GB, in round numbers."""
    weights = {"bf16": 10, "int8": 5, "nf4": 3}[frozen]
    moments = {"adamw": 8, "adamw_8bit": 2}[config.optimizer]
    weights -= config.frozen_linear == "int8"
    step = 6 * tokens / 2048 * (0.5 if config.recompute == "layers" else 1)
    return replace(SOME, peak=int((weights + moments + step) * GIB))


def asked(memory: float, frozen: str = "bf16", tokens: int = 2048, **settings) -> list[str]:
    return advice(planned, TrainConfig(**settings), frozen, tokens, memory * GIB)


TOKENS = "fewer tokens together, 256 (--micro-batch-size, --max-length)"


def test_the_advice_is_what_costs_least_and_nothing_that_is_not_needed():
    assert asked(23) == ["--optimizer adamw_8bit"]
    assert asked(23, optimizer="adamw_8bit") == [TOKENS]
    assert asked(13) == ["--optimizer adamw_8bit", TOKENS]
    assert asked(14, optimizer="adamw_8bit", recompute="layers") == [TOKENS]
    assert asked(7.8) == ["--optimizer adamw_8bit", TOKENS, "--frozen int8"]
    assert asked(6.8) == ["--optimizer adamw_8bit", TOKENS, "--frozen int8", "--frozen-linear int8"]
    assert asked(5.8) == ["--optimizer adamw_8bit", TOKENS, "--frozen nf4"]
    assert asked(4) == []


def test_what_is_done_already_is_not_advised():
    assert asked(12.75, tokens=257) == ["--optimizer adamw_8bit", TOKENS]
    assert asked(12.7, tokens=256) == ["--optimizer adamw_8bit", "--recompute layers"]
    assert asked(5.8, frozen="int8") == ["--optimizer adamw_8bit", TOKENS, "--frozen nf4"]
    assert asked(5.3, frozen="nf4")[-1] == "--frozen-linear int8"
    assert asked(4.3, frozen="nf4") == []


def test_what_just_fits_needs_no_change():
    assert asked(12.75, tokens=256) == ["--optimizer adamw_8bit"]


def test_no_format_is_advised_to_a_method_that_freezes_no_experts_of_ours():
    assert asked(15, method="full") == ["--optimizer adamw_8bit", TOKENS]
    assert asked(12, method="full") == []


def test_a_plan_is_told_in_lines_that_say_what_is_assumed_and_that_nothing_is_measured():
    text = described(SOME)
    for part in ("50 (5.0%)", "frozen experts, bf16", "moments, adamw", "Computed, not measured", "Assumed: 5 experts"):
        assert part in text
    assert "Estimated" not in text and "\nEstimated: layers go" in described(replace(SOME, of_shorter=True))
    assert "Assumed" not in described(replace(SOME, assumed=None))
    assert "12.500 GB" in described(replace(SOME, peak=12_500_000_000))


def test_every_size_of_a_plan_is_told_in_gigabytes_beside_its_name():
    names = (
        "trained_experts", "frozen_experts", "other_weights", "masters", "moments", "step", "gradients", "activations",
        "base", "peak", "stored",
    )  # fmt: skip
    lines = described(replace(SOME, **{name: (n + 1) * GIB for n, name in enumerate(names)})).split("\n")
    assert [line.split()[-2:] for line in lines[2:13]] == [[f"{n + 1}.000", "GB"] for n in range(11)]
    assert len({line.index(".000") for line in lines[2:13]}) == 1  # one under the other
    assert lines[13] == "Computed, not measured: esft, 2,048 tokens in 8 records together, recompute none."


def test_whether_it_fits_is_a_line():
    assert fitting(16, None) == "Fits 16 GB."
    assert fitting(7.5, ["--a", "--b"]) == "Does not fit 7.5 GB; it does with --a and --b."
    assert fitting(1, []) == "Does not fit 1 GB; nor with any setting: train fewer experts."
