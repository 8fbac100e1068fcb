"""The rules that are compared: the paper's, those that it is held to, and others at as many trained parameters."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import esft
from examples.demo import TOP_P

Rule = Callable[[esft.ExpertScores, random.Random], esft.ExpertSelection]


P = {"token": TOP_P, "gate": TOP_P / 2}  # the paper has 0.2 and 0.1: gate scores of a layer sum to less than 1


def paper(scores: esft.ExpertScores, by: str = "token") -> esft.ExpertSelection:
    return esft.select_experts(scores, by=by, top_p=P[by])


def chosen(by: str = "token", **more: bool) -> Rule:
    """The paper's rule, by token or by gate, with what else trains."""
    return lambda scores, rng: replace(paper(scores, by), **more)


def as_many(by: str) -> Rule:
    """By other scores, as many experts of each layer as the paper's rule by token, with the shared ones."""
    return lambda scores, rng: _with_shared(esft.select_experts(scores, by=by, like=paper(scores)))


def over_all_layers(scores: esft.ExpertScores, rng: random.Random) -> esft.ExpertSelection:
    """As many experts as the paper's rule in all, wherever they are best, with the shared ones."""
    return _with_shared(esft.select_experts(scores, budget=paper(scores).num_experts))


def upper_half(scores: esft.ExpertScores, rng: random.Random) -> esft.ExpertSelection:
    """As many experts as the paper's rule in all, of the upper half of the layers, where the backward ends early."""
    layers = sorted(scores.token_scores)
    first = layers[len(layers) // 2]
    return esft.select_experts(scores, budget=paper(scores).num_experts, first_layer=first)


def drawn(scores: esft.ExpertScores, rng: random.Random) -> esft.ExpertSelection:
    """As many experts of each layer as the paper's rule chooses, at random, with the shared ones."""
    return _in_order(scores, lambda layer: rng.sample(sorted(layer), len(layer)))


def least(scores: esft.ExpertScores, rng: random.Random) -> esft.ExpertSelection:
    """As many experts of each layer as the paper's rule chooses, those that the task uses least, and the shared."""
    return _in_order(scores, lambda layer: sorted(layer, key=layer.__getitem__))


def _in_order(scores: esft.ExpertScores, order: Callable[[dict[int, float]], list[int]]) -> esft.ExpertSelection:
    counts = {layer: len(ids) for layer, ids in paper(scores).experts.items()}
    experts = {layer: sorted(order(dict(scores.token_scores[layer]))[:count]) for layer, count in counts.items()}
    return _with_shared(esft.ExpertSelection(experts))


def _with_shared(selection: esft.ExpertSelection) -> esft.ExpertSelection:
    return replace(selection, shared_experts=True)
