"""What to change so that a training fits, and plans as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from esft.planning.plan import PLAIN, Plan
from esft.runs.config import TrainConfig

GB = 10**9
FEWEST_TOKENS = 256  # a micro batch of fewer leaves an expert few rows to multiply


def advice(
    planned: Callable[[TrainConfig, str, int], Plan], config: TrainConfig, frozen: str, tokens: int, memory: float
) -> list[str]:
    """The changes, as options of ``esft train``, with which a training that does not fit would: those that cost least,
    and none that is not needed. Empty where all of them are not enough.

    Args:
        planned: the plan with settings, a format of the frozen experts, and tokens that go through the model together.
        config, frozen, tokens: those that do not fit.
        memory: bytes to fit in.
    """

    def fits(changes: list[Change]) -> bool:
        now = config, frozen, tokens
        for _, change in changes:
            now = change(*now)
        return planned(*now).peak <= memory

    taken: list[Change] = []
    for change in _changes(config, frozen, tokens):
        taken.append(change)
        if fits(taken):
            for each in taken[:-1]:
                without = [other for other in taken if other is not each]
                taken = without if fits(without) else taken
            return [name for name, _ in taken]
    return []


Settings = tuple[TrainConfig, str, int]
Change = tuple[str, Callable[[TrainConfig, str, int], Settings]]


def _changes(config: TrainConfig, frozen: str, tokens: int) -> Iterator[Change]:
    """In the order of what they cost: nothing to speak of, time, quality."""
    if config.optimizer == "adamw":
        yield "--optimizer adamw_8bit", lambda c, f, t: (replace(c, optimizer="adamw_8bit"), f, t)
    if tokens > FEWEST_TOKENS:
        yield (
            f"fewer tokens together, {FEWEST_TOKENS} (--micro-batch-size, --max-length)",
            lambda c, f, t: (replace(c, micro_batch_size=1), f, FEWEST_TOKENS),
        )
    if config.recompute != "layers":
        yield "--recompute layers", lambda c, f, t: (replace(c, recompute="layers"), f, t)
    if config.method == "esft" and frozen == PLAIN:
        yield "--frozen int8", lambda c, f, t: (c, "int8", t)
    if config.method == "esft" and config.frozen_linear == PLAIN:
        yield "--frozen-linear int8", lambda c, f, t: (replace(c, frozen_linear="int8"), f, t)
    if config.method == "esft" and frozen not in ("nf4", "nf4_double", "mxfp4"):
        yield "--frozen nf4", lambda c, f, t: (c, "nf4", t)


def described(plan: Plan) -> str:
    """A plan as lines of text."""
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("trained", f"{plan.trained_parameters:,} ({plan.trained_parameters / plan.parameters:.1%})"),
        ("weights: trained experts", _gb(plan.trained_experts)),
        (f"weights: frozen experts, {plan.frozen}", _gb(plan.frozen_experts)),
        (f"weights: all else, linear layers {plan.frozen_linear}", _gb(plan.other_weights)),
        ("masters, beside the weights", _gb(plan.masters)),
        (f"moments, {plan.optimizer}", _gb(plan.moments)),
        ("a step, at the most", _gb(plan.step)),
        ("  of which gradients at its end", _gb(plan.gradients)),
        ("  of which activations before its backward", _gb(plan.activations)),
        ("Python and libraries", _gb(plan.base)),
        ("peak", _gb(plan.peak)),
        ("on disk afterwards", _gb(plan.stored)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    lines.append(
        f"Computed, not measured: {plan.method}, {plan.tokens:,} tokens in {plan.records} records together, "
        f"recompute {plan.recompute}."
    )
    if plan.of_shorter:
        lines.append(
            "Estimated: layers go token by token, so the step is planned of short records, as many tokens in all."
        )
    if plan.assumed is not None:
        lines.append(f"Assumed: {plan.assumed} experts a layer train; a selection file (--experts) tells.")
    return "\n".join(lines)


def fitting(memory_gb: float, changes: list[str] | None) -> str:
    """Whether a plan fits, and else with which changes, as a line; None where it does, empty where none are enough."""
    if changes is None:
        return f"Fits {memory_gb:g} GB."
    way = f"it does with {' and '.join(changes)}" if changes else "nor with any setting: train fewer experts"
    return f"Does not fit {memory_gb:g} GB; {way}."


def _gb(size: int) -> str:
    return f"{size / GB:8.3f} GB"
