import dataclasses
import json
import random

import pytest

from esft.data import report
from esft.data.batches import Packing, collate, packed_batches, steps
from esft.data.encoding import encode_all
from esft.data.examples import Example, Examples, joined
from esft.data.report import data_report, filled, pieces, places
from esft.data.sources import DataSource, read_records
from tests.esft.models import chat, record, tiny_encoder


def drawn(count: int, longest: int) -> list[Example]:
    return [Example(ids := [1] * random.Random(i).randint(1, longest), ids) for i in range(count)]


def test_the_figures_are_those_of_the_data(caplog):
    examples = encode_all(tiny_encoder(20), [record("a", "b"), record("a", "c" * 50), record("d" * 50, "e")], "d")
    report = data_report(examples, 2)
    assert (report.records, report.left_out, report.truncated, report.longest) == (3, 1, 2, 20)
    assert report.tokens == 7 + 20  # <bos><user>a<end><assistant>b<end>
    assert report.supervised == (2 + 15) / 27
    assert report.fill == 27 / (2 * 24)
    assert str(report) == (
        "3 records, 27 tokens (longest 20), 2 truncated, 1 left out; loss on 63.0% of the tokens; padded, batches are "
        "56.2% full"
    )
    assert str(data_report(examples, 2, Packing(32, "bfd"))).endswith("packed into rows of 32, batches are 84.4% full")


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("together", [None, 3])
@pytest.mark.parametrize("packing", [None, Packing(64, "bfd")])
def test_how_full_batches_are_is_what_padding_leaves_of_them(
    packing: Packing | None, together: int | None, padding_free: bool
):
    examples, mask = drawn(50, 40), []
    batches = steps(examples, 8, 0, 0, packing)
    count = 7 if packing is None else len(packed_batches(examples, 8, 0, 0, packing))
    for batch in [next(batches) for _ in range(count)]:
        parts = [batch[i : i + (together or 8)] for i in range(0, len(batch), together or 8)]
        parts = [[joined(part)] for part in parts] if padding_free else parts
        mask += [collate(part, 0)["attention_mask"].flatten() for part in parts]
    expected = sum(int(each.sum()) for each in mask) / sum(each.numel() for each in mask)
    assert filled(examples, 8, packing, None, together, padding_free) == pytest.approx(expected)


def test_packing_records_of_20_to_4000_tokens_wastes_at_most_3_percent():
    lengths = [random.Random(i).randint(20, 4000) for i in range(2000)]
    examples = Examples.of((Example([1] * n, [1] * n) for n in lengths), 2000, 0)
    assert filled(examples, 8, Packing(4096, "bfd")) >= 0.97


def test_a_text_falls_into_parts_by_what_is_learnt():
    encoder = tiny_encoder()
    example = encoder.encode_some([record("hi", "yes")])[0][0]
    text, parts = encoder.tokenizer, [("<|bos|><|user|>hi<|end|><|assistant|>", False), ("yes<|end|>", True)]
    assert pieces(text, example) == parts
    # The first token has nothing before it that it could be learnt from.
    assert pieces(text, Example(example.ids[:2], example.ids[:2])) == [("<|bos|>", False), ("<|user|>", True)]
    assert pieces(text, Example([], [])) == []


@pytest.fixture
def sources(tmp_path):
    """Two files; the second has the fourth record of the first once more, and 300 others before its last."""
    first = [chat("abcdef"[n] * (n + 1), "uvwxyz"[n] * (n + 1)) for n in range(6)]
    second = [first[3], *(chat(f"say {n}", f"{n}") for n in range(300)), chat("the last", "of all")]
    for name, records in (("one", first), ("two", second)):
        (tmp_path / f"{name}.jsonl").write_text("\n" + "".join(json.dumps({"messages": r}) + "\n" for r in records))
    return [DataSource.of(tmp_path / f"{name}.jsonl") for name in ("one", "two")]


def named(sources, *found: tuple[int, int]) -> list[str]:
    return [f"{sources[i].path}: line {line}" for i, line in found]


def test_rows_are_traced_to_the_first_records_that_have_their_tokens(sources):
    encoder = tiny_encoder()
    one, two = (encode_all(encoder, read_records(source), source.name) for source in sources)
    assert places([two[301], one[4], two[0]], sources, encoder) == named(sources, (1, 303), (0, 6), (0, 5))
    assert places([one[2], one[2]], sources, encoder) == named(sources, (0, 4))
    assert places([one[0]], sources[1:], encoder) == []


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_of_a_packed_row_every_document_is_traced_also_where_it_is_cut(sources, strategy: str):
    encoder = tiny_encoder()
    if strategy == "wrapped":
        encoder = dataclasses.replace(encoder, max_length=None)
    examples = encode_all(encoder, read_records(sources[0]), "one")
    rows = Packing(30, strategy).rows(examples)
    assert any(len(row.starts) > 1 for row in rows)
    for row in rows:
        found = places([row], sources, encoder)
        assert len(found) == len(row.starts) and all(place.startswith(sources[0].path) for place in found)
    assert sorted(set(places(rows, sources, encoder))) == named(sources, *((0, line) for line in range(2, 8)))


def test_tokens_that_lie_across_the_bytes_of_others_are_not_found(tmp_path):
    """The bytes of [1, 0] are within those of [256, 1 << 24], a byte on."""
    assert report._bytes([1, 0])[:5] in report._bytes([256, 0, 0]) and not report._within(
        report._bytes([1, 0]), report._bytes([256, 0, 0])
    )
    assert report._within(report._bytes([1, 0]), report._bytes([256, 0, 0, 1, 0]))
