"""Tasks whose records are computed: right answers, and no answer of one split in another."""

import json
from datetime import date
from decimal import Decimal

import pytest

from examples import dates, settings_json, units

SIZES = {"train": 300, "validation": 40, "test": 60}


@pytest.mark.parametrize("task", [dates, units, settings_json])
def test_splits_have_the_sizes_asked_for_and_nothing_in_common(task, tmp_path):
    options = [word for split, size in SIZES.items() for word in (f"--{split}", str(size))]
    task.main(["--out", str(tmp_path / "a"), *options])
    task.main(["--out", str(tmp_path / "b"), *options])
    task.main(["--out", str(tmp_path / "c"), "--seed", "1", *options])
    users = {}
    for split, size in SIZES.items():
        text = (tmp_path / "a" / f"{split}.jsonl").read_text()
        assert (tmp_path / "b" / f"{split}.jsonl").read_text() == text
        assert (tmp_path / "c" / f"{split}.jsonl").read_text() != text
        messages = [json.loads(line)["messages"] for line in text.splitlines()]
        users[split] = {user["content"] for user, _ in messages}
        assert len(messages) == len(users[split]) == size
    assert not (
        users["train"] & users["test"] or users["train"] & users["validation"] or users["test"] & users["validation"]
    )


def test_a_day_is_in_one_split_in_every_spelling():
    splits = dates.build(SIZES, 0)
    days = {split: {example.assistant for example in examples} for split, examples in splits.items()}
    assert not days["train"] & (days["validation"] | days["test"]) and not days["validation"] & days["test"]
    day = date(1987, 3, 3)
    assert [spell(day) for spell in dates.SPELLINGS[:4]] == [
        "3 March 1987", "March 3, 1987", "the 3rd of March, 1987", "March 3rd 1987",
    ]  # fmt: skip
    assert [spell(day) for spell in dates.SPELLINGS[6:]] == [
        "3-MAR-1987", "3.3.1987", "03.03.1987", "1987/03/03", "19870303", "1987, March 3",
    ]  # fmt: skip
    assert [dates.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)] == (
        "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 23rd 31st".split()
    )
    with pytest.raises(SystemExit, match="there are only"):
        dates.build({"test": 60_000}, 0)


def test_amounts_are_converted_exactly_and_stay_in_their_split():
    splits = units.build(SIZES, 0)
    amounts = {}
    for split, examples in splits.items():
        amounts[split] = set()
        for user, answer in examples:
            amount, unit, _, wanted = user.removeprefix("convert: ").split()
            amounts[split].add((amount, unit))
            (family,) = [family for family in units.UNITS if unit in family and wanted in family]
            value, found = answer.split()
            assert found == wanted and Decimal(value) * family[wanted] == Decimal(amount) * family[unit]
            assert "E" not in value and not (("." in value) and value.endswith("0"))
    assert not amounts["train"] & amounts["test"] and not amounts["train"] & amounts["validation"]
    assert [units.plain(Decimal(text)) for text in ("3400", "1E+3", "0.50", "2.000")] == ["3400", "1000", "0.5", "2"]


def test_settings_become_the_json_of_their_sections():
    examples = settings_json.build({"test": 200}, 0)["test"]
    flat = 0
    for user, answer in examples:
        first, *lines = user.split("\n")
        found: dict = {}
        into = found
        for line in lines:
            if line.startswith("["):
                into = found.setdefault(line[1:-1], {})
            else:
                key, value = line.split(" = ")
                into[key] = value
        assert first == "settings to JSON" and json.loads(answer) == found
        flat += not any(isinstance(value, dict) for value in found.values())
    assert 60 < flat < 140
