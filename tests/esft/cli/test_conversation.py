"""An answer's text, piece by piece as its tokens come; and what lines make of a conversation."""

import io
import signal

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from esft.cli.conversation import Stream, converse, streamed, typed
from esft.errors import DiskError, InputError, Interrupted
from tests.esft.models import tiny_tokenizer


def pieces(tokenizer, ids: list[int]) -> list[str]:
    shown = []
    stream = Stream(tokenizer, shown.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.ids == ids
    return shown


def test_a_piece_is_shown_as_soon_as_its_characters_are_whole():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("aé漢\n\U0001f600<|end|>")["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 1 + 4 + 1
    assert pieces(tokenizer, ids) == list("aé漢\n\U0001f600")


def test_bytes_that_never_become_a_character_are_shown_all_the_same():
    tokenizer = tiny_tokenizer()
    (lone,) = {tokenizer("é")["input_ids"][1]}
    shown = []
    stream = Stream(tokenizer, shown.append)
    for token in [[[0]], *[[lone]] * 5]:
        stream.put(torch.tensor(token))
    assert "".join(shown) == "\ufffd" * 2


@pytest.mark.parametrize("seed", range(5))
def test_together_the_pieces_are_the_text_of_all_tokens_also_of_bytes_that_are_none(seed: int):
    tokenizer = tiny_tokenizer()
    ids = torch.randint(0, 262, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_an_indented_line_keeps_its_spaces_where_a_tokenizer_drops_one_at_the_beginning():
    words = ["a", "\n", "▁▁▁▁b", "▁c", "<end>"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    built.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>")
    assert tokenizer.decode([2]) == "   b"
    assert pieces(tokenizer, [0, 1, 4, 2, 3]) == ["a", "\n", "    b", " c"]


ENDS = [tiny_tokenizer().eos_token_id]


def speak(streamer, text: str) -> list[str]:
    """What ``generate`` does with a streamer."""
    streamer.put(torch.zeros(1, 3, dtype=torch.long))
    for token in tiny_tokenizer()(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return [text.removesuffix("<|end|>")]


def test_an_answer_is_a_line_and_one_without_its_end_is_said_to_be_cut(capsys):
    assert streamed(lambda streamer, **_: speak(streamer, "no.<|end|>"), tiny_tokenizer(), ENDS) == "no."
    assert capsys.readouterr() == ("no.\n", "")
    assert streamed(lambda streamer, **_: speak(streamer, "no."), tiny_tokenizer(), ENDS) == "no."
    cut = "esft: the answer is cut at 3 tokens (--max-new-tokens, or the model's positions)\n"
    assert capsys.readouterr() == ("no.\n", cut)
    for other in ("<|bos|>", "<|user|>"):  # tokens before and after that of the end are none
        streamed(lambda streamer, other=other, **_: speak(streamer, "no" + other), tiny_tokenizer(), ENDS)
        assert capsys.readouterr() == ("no\n", cut)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_an_answer_and_sigterm_more_than_that(capsys, number: int):
    def answer(streamer, stopping_criteria):
        (stops,), ids = stopping_criteria, torch.ones(2, 5, dtype=torch.long)
        assert stops(ids, None).tolist() == [False, False]
        signal.raise_signal(number)
        assert stops(ids, None).tolist() == [True, True]
        return speak(streamer, "half a")

    if number == signal.SIGINT:
        assert streamed(answer, tiny_tokenizer(), ENDS) == "half a"
    else:
        with pytest.raises(Interrupted, match="terminated"):
            streamed(answer, tiny_tokenizer(), ENDS)
    assert capsys.readouterr() == ("half a\n", "")


@pytest.mark.parametrize(("interactive", "prompt"), [(True, "> "), (False, "")])
def test_lines_are_asked_for_in_a_terminal_until_they_end(monkeypatch, capsys, interactive: bool, prompt: str):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\nb"))
    assert list(typed(interactive)) == ["a", "", "b"]
    assert capsys.readouterr().out == prompt * 4
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(InputError, match="^standard input: is not utf-8$"):
        list(typed(interactive))

    def cannot(_: str) -> str:
        raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr("builtins.input", cannot)
    with pytest.raises(InputError, match="^standard input: Is a directory$"):
        list(typed(interactive))


def test_an_output_that_is_full_is_not_told_of_as_the_input(monkeypatch):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(DiskError, match="^standard output: No space left on device$"):
        list(typed(False))


def test_lines_go_on_with_a_conversation_and_commands_begin_it_anew():
    got, refused = [], []
    lines = (
        "a",
        " ",
        " b ",
        "/reset",
        "c",
        "/system  be brief ",
        "d",
        "/reset",
        "e",
        "/stop it",
        "/system",
        " /f",
        "/quit",
    )

    def reply(messages) -> str:
        got.append([(message["role"], message["content"]) for message in messages])
        return f"no. {len(got)}"

    converse([*lines, "g"], reply, refused.append)
    brief = ("system", "be brief")
    assert got == [
        [("user", "a")], [("user", "a"), ("assistant", "no. 1"), ("user", "b")], [("user", "c")],
        [brief, ("user", "d")], [brief, ("user", "e")], [("user", "/f")],
    ]  # fmt: skip
    assert [str(error).partition(" (")[0] for error in refused] == ["/stop: no command"]


def test_a_line_that_cannot_be_answered_is_no_part_of_the_conversation():
    got, refused = [], []

    def reply(messages) -> str:
        got.append([message["content"] for message in messages])
        if messages[-1]["content"] == "long":
            raise InputError("too long")
        return "no"

    converse(["a", "long", "b"], reply, refused.append)
    assert got == [["a"], ["a", "no", "long"], ["a", "no", "b"]] and [str(error) for error in refused] == ["too long"]
