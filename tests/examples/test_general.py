"""The general data: three parts that share nothing, and nothing in them that the base model was trained on."""

import importlib.util
from importlib.metadata import metadata
from pathlib import Path

import pytest

from esft.data.examples import IGNORE
from examples import general
from examples.compare import read_general
from examples.pretrain import corpus
from examples.pretrain.instructions import record, split_of
from tests.esft.models import chat, tiny_tokenizer


@pytest.fixture(scope="module")
def built():
    """The records, and the instructions as they were drawn, with their kinds."""
    drawn = []

    def watched(*args, **kwargs):
        drawn.append(record(*args, **kwargs))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "record", watched)
        return general.build(), drawn


def texts(records: list[dict], part: str) -> list[str]:
    return [item["text"] for item in records if item["part"] == part]


def test_parts_have_their_sizes_and_share_nothing(built):
    records, drawn = built
    parts = [item["part"] for item in records]
    assert list(dict.fromkeys(parts)) == ["prose", "code", "instructions"]
    assert parts.count("instructions") == len(drawn) == general.INSTRUCTIONS
    both = texts(records, "prose") + texts(records, "code")
    assert len(set(both)) == len(both)
    for part in ("prose", "code"):
        assert 20 < parts.count(part) <= general.PIECES
        assert all(general.PIECE // 2 < len(text) <= general.PIECE for text in texts(records, part))


def test_our_own_description_is_left_out():
    own = str(metadata("esft").get_payload() or metadata("esft")["Description"])
    assert len(own) > general.PIECE // 2  # long enough to be taken
    found = list(general.descriptions())
    assert found and own[: general.PIECE] not in found


def test_code_is_of_packages_that_the_corpus_left_out(built):
    assert not set(general.CODE) & set(corpus.CODE)
    half, pieces = general.PIECE // 2, set()
    for name in general.CODE:
        spec = importlib.util.find_spec(name)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for file in Path(root).rglob("*.py"):  # each piece begins behind the head of its file
                pieces.add(file.read_text(encoding="utf-8", errors="replace")[half : 3 * half])
    assert set(texts(built[0], "code")) <= pieces


def test_instructions_are_held_out(built):
    records, drawn = built
    assert [item["messages"] for item in records if item["part"] == "instructions"] == [d["messages"] for d in drawn]
    for item in drawn:
        for kind, message in zip(item["kind"].split("+"), item["messages"][::2], strict=True):
            assert split_of(kind, message["content"]) == "heldout"


def test_the_file_holds_what_is_built(built, tmp_path):
    general.main(["--out", str(tmp_path / "new" / "general.jsonl")])
    assert read_general(tmp_path / "new" / "general.jsonl") == built[0]


def test_every_token_of_a_text_counts_and_the_answers_of_instructions():
    tokenizer = tiny_tokenizer()
    records = [{"part": "prose", "text": "abcdef"}, {"part": "instructions", "messages": chat("say a", "aaa")}]
    parts = general.encode_general(tokenizer, records, max_length=5)
    (text,) = parts["prose"]
    assert tokenizer.decode(text.ids) == "<|bos|>abcd" and text.labels == text.ids
    (instruction,) = general.encode_general(tokenizer, records)["instructions"]
    assert tokenizer.decode([i for i in instruction.labels if i != IGNORE]) == "aaa<|end|>"
