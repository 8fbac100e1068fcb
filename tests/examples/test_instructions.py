"""The instruction generators: every kind works, JSON parses, splits are disjoint, seeds decide."""

import json
import re
from random import Random

import pytest

from examples.pretrain.instruction_domains import GRAMMAR
from examples.pretrain.instructions import (
    JSON_KINDS,
    KINDS,
    WEIGHTS,
    Lexicon,
    exchange,
    main,
    probe_json,
    record,
    split_of,
)

LEX = Lexicon()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    rng = Random(0)
    for _ in range(50):
        messages = record(rng, LEX, kind)["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"]
        assert all(m["content"].strip() for m in messages)
        if kind in JSON_KINDS:
            json.loads(messages[1]["content"])
    assert WEIGHTS[kind] > 0
    assert exchange(rng, LEX, kind, "heldout")[0] == kind


def test_splits_are_disjoint_and_seeded(tmp_path):
    for name in ("a", "b"):
        main(["--work", str(tmp_path / name), "--count", "1500", "--seed", "3"])
    texts = {s: (tmp_path / "a" / f"instructions.{s}.jsonl").read_text() for s in ("train", "heldout")}
    assert all(texts[s] == (tmp_path / "b" / f"instructions.{s}.jsonl").read_text() for s in texts)
    for split, text in texts.items():
        for line in text.splitlines():
            row = json.loads(line)
            for name, message in zip(row["kind"].split("+"), row["messages"][::2], strict=True):
                assert split_of(name, message["content"]) == split
    assert len(texts["train"].splitlines()) == 1500 and len(texts["heldout"].splitlines()) == 30


def test_probe_and_bad_split():
    prompt, answer = probe_json(Random(1), LEX)
    assert split_of("json_one_field", prompt) == "heldout" and len(json.loads(answer)) == 1
    with pytest.raises(ValueError, match="split"):
        record(Random(0), LEX, split="test")


def test_no_downstream_domains():
    assert not re.search(r"turn (on|off)|thermostat|\blights?\b|vacuum|\btimer|shopping list|volume|phoneme", GRAMMAR)
