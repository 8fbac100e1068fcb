"""A conversation with a model: the lines that are typed or piped in, and answers shown while they are made."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from esft.cli.output import complain, put, say, say_part
from esft.data.records import Messages
from esft.errors import InputError, Interrupted
from esft.signals import stop_signals

COMMANDS = "/reset begins anew, /system TEXT does so with instructions for the model, /quit or Ctrl-D leaves"


class Stream:
    """A streamer for transformers' ``generate`` that hands on an answer's text, piece by piece.

    Its own TextStreamer decodes each line by itself; the tokenizers that drop a space where their text begins (those of
    SentencePiece) then take one from every indented line. Here a piece is decoded behind the one before it.

    Attributes:
        ids: tokens of the answer so far.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        self._tokenizer, self._show = tokenizer, show
        self._prompted = False
        self.ids: list[int] = []
        self._start = self._end = 0  # of the last piece: its tokens
        self._seen = 0  # characters from there on that have been shown

    def put(self, ids: Any) -> None:
        """The prompt first, of shape [1, L]; then a token a time, of shape [1]."""
        if self._prompted:
            self.ids += ids.tolist()
            self._hand_on(3)
        self._prompted = True

    def end(self) -> None:
        self._hand_on(0)

    def _hand_on(self, most: int) -> None:
        """Show what is new, but for as many bytes at the end that are no character yet, and may become one."""
        text = self._decoded()
        end = max(len(text.rstrip("\ufffd")), len(text) - most)
        if end > self._seen:
            self._show(text[self._seen : end])
            self._seen = end
            if end == len(text):
                self._start, self._end = self._end, len(self.ids)
                self._seen = len(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.ids[self._start :], skip_special_tokens=True)


def streamed(answer: Callable[..., list[str]], tokenizer: Any, ends: Collection[int]) -> str:
    """An answer, shown while it is made; up to where SIGINT stops it.

    Args:
        answer: what takes ``streamer`` and ``stopping_criteria`` of ``generate``, and gives one answer.
        ends: tokens that end it.

    An answer without an end is said to be cut. A second SIGINT ends the process. Raises Interrupted for SIGTERM.
    """
    stream = Stream(tokenizer, say_part)
    with stop_signals() as asked:

        def stops(ids: Any, _: Any) -> Any:
            return ids.new_full(ids.shape[:1], asked() is not None).bool()

        (text,) = answer(streamer=stream, stopping_criteria=[stops])
    say("")
    if asked() == signal.SIGTERM:
        raise Interrupted("terminated", signal.SIGTERM)
    if not asked() and not (stream.ids and stream.ids[-1] in ends):
        complain(f"the answer is cut at {len(stream.ids)} tokens (--max-new-tokens, or the model's positions)")
    return text


def typed(interactive: bool) -> Iterator[str]:
    """The lines of standard input. Raises InputError for what is no text."""
    if interactive:
        with contextlib.suppress(ImportError):  # lines can be edited, and are remembered
            import readline  # noqa: F401
    while True:
        put("", flush=True)  # else ``input`` does, and what is wrong with standard output would be of standard input
        try:
            yield input("> " if interactive else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: is not {error.encoding}") from error
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(f"standard input: {error.strerror or error}") from error


def converse(lines: Iterable[str], reply: Callable[[Messages], str], refused: Callable[[InputError], None]) -> None:
    """Answer lines, each as the next turn of a conversation, until they end; those with a command do what it says.

    Args:
        reply: the answer to messages, of which the last is the user's.
        refused: told of a line that cannot be used, which the conversation goes on without.
    """
    start: Messages = []
    messages = start
    for line in lines:
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/system":
                start = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
            if command in ("/system", "/reset"):
                messages = start
            elif command.startswith("/"):
                raise InputError(f"{command}: no command (a message may begin with a blank); {COMMANDS}")
            elif line.strip():
                said = [*messages, {"role": "user", "content": line.strip()}]
                messages = [*said, {"role": "assistant", "content": reply(said)}]
        except InputError as error:
            refused(error)
