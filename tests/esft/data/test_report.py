import random

import pytest

from esft.data.batches import Packing, collate, packed_batches, steps
from esft.data.encoding import encode_all
from esft.data.examples import Example, Examples, joined
from esft.data.report import data_report, filled, pieces
from tests.esft.models import record, tiny_encoder


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
