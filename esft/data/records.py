"""Records: what one row of a data set means, whichever of the known columns it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esft.errors import InputError
from esft.storage.reading import parse_json, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of them.
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "observation": "tool",
} | {role: role for role in ROLES}
# What makes a record, in the order in which it is looked for; TRL's names but for ShareGPT's.
KINDS = (("messages",), ("prompt", "completion"), ("conversations",), ("text",))
COLUMNS = (*(name for kind in KINDS for name in kind), "tools", "chat_template_kwargs", "choices")
# What a record may not set of a rendering: it is ours to say.
_OURS = frozenset(
    "self conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "sanitize_control_tokens".split()
)

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Record:
    """One conversation, or one text where there are no messages.

    Attributes:
        messages: the turns, as the chat template gets them. An assistant turn with the weight 0 does not count.
        text: as it is, without a chat template.
        prompt: how much of it is the prompt: messages of a conversation, characters of a text.
        tools: JSON schemas of what the assistant may call.
        template: further variables of the chat template.
        choices: texts of which the last answer is one, at least two and no two alike; None without such.
        place: where it was read, within its source: "line 3".
    """

    messages: Messages = field(default_factory=list)
    text: str = ""
    prompt: int = 0
    tools: list[dict[str, Any]] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    choices: list[str] | None = None
    place: str = field(default="", compare=False)


def counts(message: Mapping[str, Any]) -> bool:
    """Whether a message is an assistant's turn to learn from."""
    return message["role"] == "assistant" and message.get("weight") != 0


def as_record(row: Any, source: str, place: str) -> Record:
    """The record that a row is. A null is a missing value.

    Args:
        source: where the row comes from, and ``place`` where in there, for messages.

    Raises InputError naming both for a row with none of the known columns, and for whatever cannot be used in them.
    """
    where = f"{source}: {place}"
    if not isinstance(row, dict):
        raise InputError(f"{where}: is no record, which is a mapping of columns; {_wanted()}")
    row = {name: value for name, value in row.items() if value is not None}
    kind = next((kind for kind in KINDS if row.keys() >= set(kind)), None)
    if kind is None:
        found = ", ".join(shown(str(name))[1:-1] for name in list(row)[:9]) or "none"
        raise InputError(f"{where}: has none of the columns that make a record (it has: {found}); {_wanted()}")
    if kind == ("text",):
        return Record(text=_text(row["text"], "text", where), place=place)
    if kind == ("prompt", "completion") and not isinstance(row["prompt"], list):
        prompt = _text(row["prompt"], "prompt", where, empty=True)
        text = prompt + _text(row["completion"], "completion", where)
        return Record(text=text, prompt=len(prompt), choices=_choices(row.get("choices")), place=place)
    messages = [_message(message, where) for name in kind for message in _list(row[name], name, where)]
    prompt = len(row["prompt"]) if "prompt" in kind else 0
    if not any(message["role"] == "assistant" for message in messages[prompt:]):
        raise InputError(f"{where}: no assistant turn{' in its completion' if prompt else ''}")
    if not any(map(counts, messages[prompt:])):
        raise InputError(f"{where}: every assistant turn has the weight 0")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: begins with an assistant turn")
    tools, template = _tools(row.get("tools"), where), _template(row, where)
    return Record(messages, "", prompt, tools, template, _choices(row.get("choices")), place)


def _wanted() -> str:
    return "a record has " + ", or ".join(" and ".join(kind) for kind in KINDS)


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f'{where}: no "{name}" list of messages')
    return value


def _text(value: Any, what: str, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} must be text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: {what} holds half of a surrogate pair")
    if not (value or empty):
        raise InputError(f"{where}: {what} is empty")
    return value


def _message(given: Any, where: str) -> dict[str, Any]:
    """A message with role and content, ShareGPT's names turned into these."""
    if not isinstance(given, dict):
        raise InputError(f"{where}: a message's role must be one of {', '.join(ROLES)}")
    message = {name: value for name, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise InputError(f'{where}: a message is "from" {shown(speaker)}; it must be one of {", ".join(SPEAKERS)}')
        message = {"role": SPEAKERS[speaker], "content": message.pop("value", None), **message}
    if message.get("role") not in ROLES:
        said = f", got {shown(message['role'])}" if "role" in message else ""
        raise InputError(f"{where}: a message's role must be one of {', '.join(ROLES)}{said}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InputError(f"{where}: a message's tool_calls must be a list of mappings")
    if "content" in message or not calls:  # who calls a tool need not say anything
        _text(message.get("content"), "a message's content", where, empty=True)
    weight = message.get("weight", 1)
    if weight not in (0, 1) or ("weight" in message and weight and message["role"] != "assistant"):
        raise InputError(f"{where}: a message's weight must be 0, or 1 in an assistant turn, got {shown(weight)}")
    return message


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tools as they are, or as JSON text: columns of Parquet files have one schema, and tools do not."""
    if isinstance(value, str):
        value = parse_json(value, f"{where}: tools", lines=False)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(f"{where}: tools must be a list of JSON schemas, or such a list as JSON text")
    return value


def _template(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    value = row.get("chat_template_kwargs", {})
    if not isinstance(value, dict):
        raise InputError(f"{where}: chat_template_kwargs must be a mapping")
    if ours := sorted(value.keys() & _OURS):
        raise InputError(f"{where}: chat_template_kwargs cannot set {ours[0]}")
    return {name: each for name, each in value.items() if each is not None}


def _choices(value: Any) -> list[str] | None:
    """None for anything else in a column of that name, which may have nothing to do with an answer."""
    texts = isinstance(value, list) and all(isinstance(each, str) and each for each in value)
    return value if texts and len(value) >= 2 and len(set(value)) == len(value) else None
