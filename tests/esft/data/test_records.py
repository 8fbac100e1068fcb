import re

import pytest

import esft
from esft.data.records import Record, as_record
from tests.esft.models import chat

USER, REPLY = chat("a", "b")


def read(row) -> Record:
    return as_record(row, "d", "line 3")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, REPLY], "id": 3}, Record([USER, REPLY])),
        ({"messages": [USER, REPLY], "text": "x"}, Record([USER, REPLY])),
        ({"prompt": [USER], "completion": [REPLY]}, Record([USER, REPLY], prompt=1)),
        ({"prompt": "ab", "completion": "c"}, Record(text="abc", prompt=2)),
        ({"prompt": "", "completion": "c"}, Record(text="c")),
        ({"text": "abc", "messages": None}, Record(text="abc")),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Record([USER, REPLY]),
        ),
        ({"conversations": [USER, REPLY]}, Record([USER, REPLY])),
        ({"messages": [USER, REPLY | {"weight": None}]}, Record([USER, REPLY])),
        ({"messages": [USER, REPLY], "tools": [{"a": 1}]}, Record([USER, REPLY], tools=[{"a": 1}])),
        ({"messages": [USER, REPLY], "tools": '[{"a": 1}]'}, Record([USER, REPLY], tools=[{"a": 1}])),
        (
            {"messages": [USER, REPLY], "chat_template_kwargs": {"a": 1, "b": None}},
            Record([USER, REPLY], template={"a": 1}),
        ),
    ],
)
def test_a_row_is_a_record_by_its_columns(row: dict, expected: Record):
    assert read(row) == expected
    assert read(row).place == "line 3"  # which is of no account to whether records are equal


def test_an_assistant_may_call_tools_and_say_nothing():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "3"}
    found = read({"messages": [USER, call, result, REPLY]})
    assert found.messages == [USER, {"role": "assistant", "tool_calls": call["tool_calls"]}, result, REPLY]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [1],
            "is no record, which is a mapping of columns; "
            "a record has messages, or prompt and completion, or conversations, or text",
        ),
        ({"a": 1, "prompt": "x"}, "has none of the columns that make a record (it has: a, prompt); a record has"),
        ({}, "has none of the columns that make a record (it has: none)"),
        (dict.fromkeys("abcdefghij", 1), "has none of the columns that make a record (it has: "
                                         "a, b, c, d, e, f, g, h, i);"),
        ({7: 1}, "has none of the columns that make a record (it has: 7);"),
        ({"messages": []}, 'no "messages" list'),
        ({"messages": "user"}, 'no "messages" list'),
        ({"conversations": {}}, 'no "conversations" list'),
        ({"messages": ["user"]}, "a message's role must be one of system, developer, user, assistant, tool"),
        ({"messages": [{"content": "a"}]}, "a message's role must be one of"),
        ({"messages": [USER, REPLY | {"role": "robot"}]}, "a message's role must be one of system, developer, user, "
                                                          "assistant, tool, got 'robot'"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "a message is \"from\" 'me'; it must be one of human, gpt"),
        ({"conversations": [{"from": ["me"], "value": "a"}]}, "a message is \"from\" ['me']; it must be one of human"),
        ({"conversations": [{"from": "human"}]}, "a message's content must be text"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"prompt": [USER, REPLY], "completion": [USER]}, "no assistant turn in its completion"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "a message's content must be text"),
        ({"messages": [USER, {"role": "assistant"}]}, "a message's content must be text"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, "a message's content must be text"),
        ({"messages": [USER, REPLY | {"tool_calls": "f"}]}, "a message's tool_calls must be a list of mappings"),
        ({"messages": [REPLY]}, "begins with an assistant turn"),
        ({"messages": [USER, REPLY | {"weight": 0}]}, "every assistant turn has the weight 0"),
        ({"messages": [USER, REPLY | {"weight": 2}]}, "a message's weight must be 0, or 1 in an assistant turn, got 2"),
        ({"messages": [USER | {"weight": 1}, REPLY]}, "a message's weight must be 0, or 1 in an assistant turn, got 1"),
        ({"messages": [USER, REPLY], "tools": {}}, "tools must be a list of JSON schemas"),
        ({"messages": [USER, REPLY], "tools": "[1"}, "tools: not JSON"),
        ({"messages": [USER, REPLY], "tools": [1]}, "tools must be a list of JSON schemas"),
        ({"messages": [USER, REPLY], "chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping"),
        (
            {"messages": [USER, REPLY], "chat_template_kwargs": {"a": 1, "chat_template": "x"}},
            "chat_template_kwargs cannot set chat_template",
        ),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": [REPLY]}, "completion must be text"),
        ({"prompt": [USER], "completion": "b"}, 'no "completion" list'),
        ({"text": ""}, "text is empty"),
        ({"text": ["a"]}, "text must be text"),
        *(
            ({"messages": [USER, {"role": "assistant", "content": f"a{half}b"}]}, "content holds half of a surrogate")
            for half in ("\ud800", "\udabc", "\udfff")
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_in_a_row_is_named_with_its_place(row, message: str):
    with pytest.raises(esft.InputError, match=r"^d: line 3: (a message's )?" + re.escape(message)):
        read(row)


def test_what_a_user_says_may_have_the_weight_0():
    assert read({"messages": [USER | {"weight": 0}, REPLY | {"weight": 1}]}).messages[0]["weight"] == 0
