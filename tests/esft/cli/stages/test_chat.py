"""What ``esft chat`` makes of the lines that it gets, and what it shows."""

import io
import signal
from pathlib import Path

import pytest
import torch

import esft
from esft.checkpoint.load import load_model
from esft.cli.output import say_part
from esft.cli.parser import main
from esft.cli.stages import chat
from esft.data.records import Record
from esft.evaluation import answers as module
from tests.esft.cli.conftest import MODEL, NO_COUNTS, OF_MODEL, adapter, refused, stage, usage, values
from tests.esft.models import save_tiny, tiny_tokenizer

USER, ASSISTANT, SYSTEM = ("user", "assistant", "system")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typing(monkeypatch):
    def typed(*lines: str, into: type[io.StringIO] = io.StringIO) -> None:
        monkeypatch.setattr("sys.stdin", into("".join(f"{line}\n" for line in lines)))

    return typed


@pytest.fixture
def said(calls, monkeypatch):
    """Every conversation that the model gets, which answers "no. N"."""
    got = []

    def answer(model, tokenizer, prompts, max_new_tokens, streamer, stopping_criteria):
        (prompt,) = prompts
        got.append([(message["role"], message["content"]) for message in prompt.messages])
        return [speak(streamer, f"no. {len(got)}")]

    monkeypatch.setattr(module, "answer", answer)
    return got


def speak(streamer, text: str, end: str = "<|end|>") -> str:
    """What ``generate`` does with a streamer."""
    streamer.put(torch.zeros(1, 3, dtype=torch.long))
    for token in tiny_tokenizer()(text + end)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return text


def test_a_conversation_goes_on_begins_anew_and_ends(work, said, typing, capsys):
    typing("a", "", "  b ", "/reset", "c", "/system  be brief ", "d", "/reset", "e", "/system", " /usr?", "/quit", "f")
    stage("chat --model m")
    first = [(USER, "a"), (ASSISTANT, "no. 1"), (USER, "b")]
    assert said == [
        first[:1], first, [(USER, "c")], [(SYSTEM, "be brief"), (USER, "d")], [(SYSTEM, "be brief"), (USER, "e")],
        [(USER, "/usr?")],
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert printed.out == "".join(f"no. {i}\n" for i in range(1, 7)) and printed.err == ""


def test_the_model_is_loaded_as_every_other_stage_loads_it(work, said, calls, typing):
    adapter(work)
    typing("a")
    stage("chat --model m --adapter a --frozen nf4 --dtype float32 --trust-remote-code --quiet")
    assert calls.of["load_with_adapter"] == [(("m", Path("a"), "nf4", "float32", "auto", True, False, "bf16"), {})]
    assert main("chat --model m --adapter absent".split()) == 2 and len(calls.of["load_with_adapter"]) == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/stop it", "/stop: no command (a message may begin with a blank); /reset begins anew, "),
        ("x" * 50, "the conversation: has 64 tokens, more than --max-length 20; /reset begins anew"),
    ],
)
def test_what_cannot_be_used_ends_a_script_and_is_passed_over_in_a_terminal(
    work, said, typing, capsys, line: str, complaint: str
):
    typing("a", line, "b")
    assert main("chat --model m --max-length 20".split()) == 2
    assert capsys.readouterr().err.startswith(f"esft: {complaint}") and len(said) == 1
    said.clear()
    typing("a", line, "b", "/reset", "c", into=Terminal)
    stage("chat --model m --max-length 20")
    printed = capsys.readouterr()
    assert printed.err.startswith(f"esft: {complaint}") and said[-1] == [(USER, "c")]
    assert printed.out.startswith("/reset begins anew") and "> no. 1\n> " in printed.out


def test_what_is_no_text_is_named(work, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert main("chat --model m".split()) == 2
    assert capsys.readouterr().err == "esft: standard input: is not utf-8\n"


def test_a_model_cannot_move_the_cursor_and_its_lines_are_lines(work, calls, typing, monkeypatch, capsys):
    monkeypatch.setattr(
        module, "answer", lambda *_, streamer, **__: [speak(streamer, "a\x1b[2Jb\r\n\tc\u202ed\u2028é")]
    )
    typing("a")
    stage("chat --model m")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\r\n\tc\\u202ed\\u2028é\n"


@pytest.mark.parametrize(("number", "status", "answers"), [(signal.SIGINT, 0, 2), (signal.SIGTERM, 143, 1)])
def test_a_signal_ends_the_answer_and_sigterm_the_program(
    work, calls, typing, monkeypatch, capsys, number: int, status: int, answers: int
):
    got = []

    def answer(model, tokenizer, prompts, max_new_tokens, streamer, stopping_criteria):
        got.append(prompts[0].messages)
        (stops,) = stopping_criteria
        ids = torch.zeros(1, 5, dtype=torch.long)
        assert stops(ids, None).tolist() == [False]
        signal.raise_signal(number)
        assert stops(ids, None).tolist() == [True] and stops(ids, None).dtype == torch.bool
        return [speak(streamer, "half a", end="")]

    monkeypatch.setattr(module, "answer", answer)
    before = signal.getsignal(number)
    typing("a", "b")
    assert main("chat --model m".split()) == status
    assert len(got) == answers and signal.getsignal(number) is before
    assert got[-1][1:2] == [{"role": ASSISTANT, "content": "half a"}][: answers - 1]
    assert capsys.readouterr().err == ("" if number == signal.SIGINT else "esft: terminated\n")


def test_a_real_model_says_what_it_says_at_once_and_a_cut_is_told(work, typing, capsys):
    save_tiny(work / "base")
    typing("say a", "and b")
    stage("chat --model base --max-new-tokens 9 --quiet")
    printed = capsys.readouterr()
    model, messages = load_model("base"), []
    for text in ("say a", "and b"):
        messages.append({"role": USER, "content": text})
        (reply,) = module.answer(model, tiny_tokenizer(), [Record([*messages])], 9)
        messages.append({"role": ASSISTANT, "content": reply})
        say_part(f"{reply}\n")
    assert capsys.readouterr().out == printed.out and messages[1] != messages[3]
    assert printed.err == "esft: the answer is cut at 9 tokens (--max-new-tokens, or the model's positions)\n" * 2


def test_weights_that_hold_no_numbers_are_an_error(work, typing, capsys):
    model = load_model(str(save_tiny(work / "base")))
    model.lm_head.weight.data[5] = torch.nan
    model.save_pretrained(work / "base")
    typing("a")
    with pytest.raises(esft.InputError):
        module.answer(model, tiny_tokenizer(), [Record([{"role": USER, "content": "a"}])])
    capsys.readouterr()  # bars of what was saved and loaded, unless a test before has hidden them
    assert main("chat --model base --quiet".split()) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_chat_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, chat) == f"{MODEL} [--adapter ADAPTER] [--max-new-tokens MAX_NEW_TOKENS]"
    assert values(monkeypatch, "chat --model m") == {**OF_MODEL, "adapter": None, "max_new_tokens": 1024}


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("option", ["--max-length", "--max-new-tokens"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, option: str, value: str):
    assert f"argument {option}: " in refused(capsys, f"chat --model m {option} {value}")
