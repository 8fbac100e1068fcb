"""Words written without the space that came before them: in quotes, brackets, lists, at the start of a line.

A byte-level vocabulary has one token for " word" and, for most words, several for "word": to copy a word out of a
sentence into a JSON string is then a matter of spelling it, which these kinds teach for the whole vocabulary.
"""

from __future__ import annotations

import json

from examples.pretrain.instruction_kinds import kind, mixed
from examples.pretrain.instruction_words import number_words, pick, piece, word


def _items(rng, lex, low: int, high: int) -> list[str]:
    n = rng.randint(low, high)
    x = rng.random()
    if x < 0.65:
        return [piece(rng, lex) for _ in range(n)]
    return [word(rng, lex) for _ in range(n)] if x < 0.85 else mixed(rng, lex, n, n)


@kind(
    18,
    "quote each word",
    "put every (word|token) in quotes",
    "each (word|item) in quotation marks",
    "write (the|these) (words|tokens) in quotes",
    "(words|tokens) to a JSON array",
    "split (at spaces|into words) as JSON",
)
def quote_words(rng, lex):
    items = _items(rng, lex, 3, 14)
    return {}, " ".join(items), json.dumps(items, ensure_ascii=False)


@kind(
    8,
    "join (the words|these) with {s}",
    "put {s} between the (words|tokens)",
    "replace spaces by {s}",
    "write with {s} instead of spaces",
)
def join_with(rng, lex):
    name, mark = pick(
        rng,
        [
            ("slashes", "/"),
            ("hyphens", "-"),
            ("underscores", "_"),
            ("colons", ":"),
            ("equals signs", "="),
            ("bars", "|"),
        ],
    )
    items = _items(rng, lex, 2, 10)
    return {"s": name}, " ".join(items), mark.join(items)


@kind(
    6,
    "one word (a|per) line",
    "each (word|token) on its own line",
    "split into lines",
    "(words|tokens) as lines",
)
def one_per_line(rng, lex):
    items = _items(rng, lex, 2, 10)
    return {}, " ".join(items), "\n".join(items)


@kind(
    4,
    "(numbers|amounts) to a JSON array",
    "JSON list of the numbers in figures",
    "write the numbers as JSON",
    "figures as a JSON array",
)
def numbers_to_json(rng, lex):
    values = [rng.randint(0, rng.choice([12, 99, 990])) for _ in range(rng.randint(1, 5))]
    sep = pick(rng, [", ", "; ", "\n", ", "])
    return {}, sep.join(number_words(v) if rng.random() < 0.8 else str(v) for v in values), json.dumps(values)
