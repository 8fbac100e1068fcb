import pytest

from esft.data.records import Record
from esft.data.rendering import Rendered, render, rendered
from tests.esft.models import chat, record, tiny_tokenizer


def test_spans_are_the_characters_from_the_answers_header_to_its_end():
    text, spans = "<|bos|><|user|>a<|end|><|assistant|>bc<|end|>", [(36, 45, True)]
    assert rendered(tiny_tokenizer(), record("a", "bc")) == Rendered(text, spans, plain=False)
    assert text[36:45] == "bc<|end|>"


@pytest.mark.parametrize("completion_only", [True, False])
def test_a_text_ends_with_the_end_token_and_begins_to_count_behind_its_prompt(completion_only: bool):
    found = rendered(tiny_tokenizer(), Record(text="abc", prompt=2), completion_only=completion_only)
    assert found == Rendered("abc<|end|>", [(2 * completion_only, 10, True)], plain=True)


def test_each_turn_is_rendered_once_more_than_the_whole(monkeypatch):
    """What costs time: the whole, and for each turn what is before it, and with it unless that is the whole."""
    tokenizer, calls = tiny_tokenizer(), []
    real = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(len(a[0])) or real(*a, **k))
    rendered(tokenizer, Record([*chat("a", "b"), *chat("c", "d")]))
    assert sorted(calls) == [1, 2, 3, 4]


def test_a_part_of_a_conversation_is_rendered_with_the_header_of_the_answer_where_asked():
    tokenizer, whole = tiny_tokenizer(), record("a", "b")
    assert render(tokenizer, whole).endswith("b<|end|>")
    assert render(tokenizer, whole, whole.messages[:1]).endswith("a<|end|>")
    assert render(tokenizer, whole, whole.messages[:1], add_generation_prompt=True).endswith("a<|end|><|assistant|>")
