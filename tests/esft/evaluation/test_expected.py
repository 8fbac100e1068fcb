import pytest

import esft
from esft.data.records import Record
from esft.evaluation.expected import Expected, expected_answer, split_prompt
from tests.esft.models import chat, record, tiny_tokenizer

# As Qwen3 has it, an empty thought before the last answer; and calls of tools as JSON.
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def thinking():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    return tokenizer


def test_the_last_assistant_turn_is_the_one_to_answer():
    before = [*chat("a", "b"), {"role": "user", "content": "c"}]
    after = [{"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]
    assert split_prompt(Record([*before, *after], tools=[{}])) == (Record(before, tools=[{}]), "d")


def test_of_a_text_the_completion_is_the_answer():
    assert split_prompt(Record(text="abc", prompt=2)) == (Record(text="ab", prompt=2), "c")
    with pytest.raises(esft.InputError, match="^line 3: is a text without a prompt, which has no answer to compare$"):
        split_prompt(Record(text="abc", place="line 3"))


def test_what_a_template_puts_before_every_answer_is_compared_with_none():
    tokenizer = thinking()
    found = expected_answer(tokenizer, record("a", "think"), [tokenizer.eos_token_id])
    assert (found.text, found.lead) == ("think", "<think>\n\n</think>\n\n")
    assert found.tokens == len("<think>\n\n</think>\n\nthink")  # one a byte
    assert found.without_lead("<think>\n\n</think>\n\nthink") == "think"
    assert found.without_lead("think") == "think"
    assert found.without_lead("<think>so</think>think") == "<think>so</think>think"


def test_without_a_lead_an_answer_stays_as_it_is():
    tokenizer = tiny_tokenizer()
    found = expected_answer(tokenizer, record("a", "b c"), [tokenizer.eos_token_id])
    assert found == Expected(record("a", "b c").__class__(chat("a", "")[:1]), "b c", "", 3)
    assert found.without_lead(" b c\n") == " b c\n"
    assert expected_answer(tokenizer, Record(text="abc", prompt=1), []) == Expected(
        Record(text="a", prompt=1), "bc", "", 2
    )


def test_of_a_turn_that_calls_tools_all_that_the_template_makes_of_it_is_expected_up_to_its_end():
    tokenizer = thinking()
    call = {"type": "function", "function": {"name": "turn_on", "arguments": {}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    found = expected_answer(tokenizer, Record([*chat("a", "")[:1], turn]), [tokenizer.eos_token_id])
    assert found.text == "<think>\n\n</think>\n\n<call>turn_on</call>"
    assert found.tokens == len(found.text) and found.lead == ""


def test_a_template_that_renders_the_prompt_otherwise_has_no_lead():
    tokenizer = thinking()
    tokenizer.chat_template = "{% if add_generation_prompt %}x{% endif %}" + THINKS
    assert expected_answer(tokenizer, record("a", "b"), []).lead == ""
