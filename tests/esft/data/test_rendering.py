import pytest
from transformers import PreTrainedTokenizerFast

import esft
from esft.data import rendering
from esft.data.encoding import encode_prompt
from esft.data.records import Record
from esft.data.rendering import Rendered, render, rendered
from tests.esft.models import chat, record, tiny_tokenizer

MARKED = (
    "{% for m in messages %}{{ m['role'][0] }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] }}{%- endgeneration -%}{% else %}{{ m['content'] }}{% endif %}.{% endfor %}"
)


def test_spans_are_the_characters_from_the_answers_header_to_its_end():
    text, spans = "<|bos|><|user|>a<|end|><|assistant|>bc<|end|>", [(36, 45, True)]
    assert rendered(tiny_tokenizer(), record("a", "bc")) == Rendered(text, spans, plain=False)
    assert text[36:45] == "bc<|end|>"


@pytest.mark.parametrize("completion_only", [True, False])
def test_a_text_ends_with_the_end_token_and_begins_to_count_behind_its_prompt(completion_only: bool):
    found = rendered(tiny_tokenizer(), Record(text="abc", prompt=2), completion_only=completion_only)
    assert found == Rendered("abc<|end|>", [(2 * completion_only, 10, True)], plain=True)


@pytest.mark.parametrize(("text", "end", "whole"), [("ab", "", "ab"), ("ab", None, "ab"), ("abz", "z", "abz")])
def test_a_text_gets_no_end_that_the_tokenizer_lacks_or_that_it_has_already(text: str, end: str | None, whole: str):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = end
    assert rendered(tokenizer, Record(text=text)) == Rendered(whole, [(0, len(whole), True)], plain=True)


def marked() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    return tokenizer


BOTH = [*chat("a", "bc"), *chat("d", "ef")]  # rendered to ua.abc.ud.aef.


def test_where_the_template_has_marks_the_spans_are_these():
    assert rendered(marked(), Record(BOTH)) == Rendered("ua.abc.ud.aef.", [(4, 6, True), (11, 13, True)], plain=False)


def test_of_marked_turns_those_that_do_not_count_are_left_out():
    text = "ua.abc.ud.aef."
    assert rendered(marked(), Record(BOTH, prompt=3)) == Rendered(text, [(11, 13, True)], plain=False)
    silent = [*BOTH[:3], BOTH[3] | {"weight": 0}]
    assert rendered(marked(), Record(silent)) == Rendered(text, [(4, 6, True)], plain=False)


def test_marks_that_are_fewer_than_the_turns_cannot_tell_which_one_does_not_count():
    tokenizer, silent = marked(), [BOTH[0], BOTH[1] | {"weight": 0}, *BOTH[2:]]
    tokenizer.chat_template = "{% generation %}{{ messages | length }}{% endgeneration %}"
    assert rendered(tokenizer, Record(BOTH)).spans == [(0, 1, True)]
    with pytest.raises(esft.InputError, match="^the chat template marks 1 generations of 2 assistant turns$"):
        rendered(tokenizer, Record(silent))


def test_everything_but_the_prompt_and_turns_of_weight_0_counts_where_that_is_asked_for():
    tokenizer, silent = tiny_tokenizer(), [BOTH[0], BOTH[1] | {"weight": 0}, *BOTH[2:]]
    whole = render(tokenizer, Record(BOTH))
    reply, second = whole.index("bc"), whole.index("<|user|>d")
    assert rendered(tokenizer, Record(BOTH), assistant_only=False).spans == [(0, len(whole), True)]
    assert rendered(tokenizer, Record(silent), assistant_only=False).spans == [
        (0, len(whole), True), (reply, second, False),
    ]  # fmt: skip
    for prompt, begins in ((1, reply), (2, second), (3, whole.index("ef"))):
        found = rendered(tokenizer, Record(BOTH, prompt=prompt), assistant_only=False)
        assert found.spans == [(begins, len(whole), True)]
        assert rendered(tokenizer, Record(BOTH, prompt=prompt), False, completion_only=False).spans[0][0] == 0
    # Marks come on top of that.
    assert rendered(marked(), Record(BOTH), assistant_only=False).spans == [
        (0, 14, True), (4, 6, True), (11, 13, True),
    ]  # fmt: skip


def test_of_a_template_for_tools_its_own_marks_are_looked_for():
    tokenizer, tools = tiny_tokenizer(), [{"name": "lamp"}]
    tokenizer.chat_template = {"default": "no marks: {{ messages | length }}", "tool_use": MARKED}
    assert rendered(tokenizer, Record(BOTH, tools=tools)).spans == [(4, 6, True), (11, 13, True)]


def test_a_prefix_that_is_rendered_otherwise_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(esft.InputError, match="^the chat template renders a prefix .* has no {% generation %} marks"):
        rendered(tokenizer, record("a", "b"))


def test_what_the_template_makes_may_have_just_so_many_characters(monkeypatch):
    length = len(render(tiny_tokenizer(), record("a", "b")))
    monkeypatch.setattr(rendering, "TEXT", length)
    assert len(rendered(tiny_tokenizer(), record("a", "b")).text) == length
    monkeypatch.setattr(rendering, "TEXT", length - 1)
    with pytest.raises(esft.InputError, match=f"^the chat template makes {length} characters of it; at most"):
        rendered(tiny_tokenizer(), record("a", "b"))


def test_a_text_may_have_just_so_many_characters(monkeypatch):
    monkeypatch.setattr(rendering, "TEXT", 3)
    assert rendered(tiny_tokenizer(), Record(text="abc")).text.startswith("abc")
    for read in (lambda r: rendered(tiny_tokenizer(), r), lambda r: encode_prompt(tiny_tokenizer(), r)):
        with pytest.raises(esft.InputError, match="^the text has 4 characters; at most 3 are read$"):
            read(Record(text="abcd"))


def test_tools_and_variables_are_in_every_rendering():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools[0].name }}{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    some = Record(BOTH, tools=[{"name": "lamp"}], template={"mood": "kind"})
    assert render(tokenizer, some, BOTH[:2]) == "lampkindabc"
    assert rendered(tokenizer, some).spans == [(9, 11, True), (12, 14, True)]
    tokenizer.chat_template = "{{ tools[0].name }}{{ mood }}" + MARKED
    assert rendered(tokenizer, some) == Rendered(
        "lampkindua.abc.ud.aef.", [(12, 14, True), (19, 21, True)], plain=False
    )


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
