"""``esft chat``: a conversation with a model, in the terminal or with the lines of a pipe."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from esft.cli.arguments import count
from esft.cli.conversation import COMMANDS, converse, streamed, typed
from esft.cli.inputs import adapter_of, load_for
from esft.cli.options import Stages, add_adapter, add_model, add_stage
from esft.cli.output import explain, say
from esft.data.records import Messages, Record
from esft.errors import InputError, reading


def add(stages: Stages) -> None:
    sub = add_stage(stages, "chat", "talk with a model: answers are shown while they are made, and Ctrl-C stops one")
    add_model(sub, "tokens that a conversation may have; a longer one is refused")
    add_adapter(sub)
    sub.add_argument("--max-new-tokens", type=count, default=1024, help="tokens of an answer (default 1,024)")


def run(args: argparse.Namespace) -> None:
    from esft.checkpoint.load import load_tokenizer
    from esft.checkpoint.source import Reach, open_config
    from esft.evaluation.answers import answer, encode_within, end_tokens

    adapter, interactive = adapter_of(args), sys.stdin.isatty()

    def refused(error: InputError) -> None:
        if not interactive:  # what comes down a pipe was written without seeing this
            raise error
        explain(error)

    with reading(args.model):
        reach = Reach.of(open_config(args.model, args.trust_remote_code))
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        longest = reach.length(args.max_length)
        model = load_for(args, adapter)
        ends = end_tokens(model, tokenizer)

        def reply(messages: Messages) -> str:
            prompt = Record(messages)
            try:
                encode_within(tokenizer, prompt, reach, longest)
            except InputError as error:
                raise InputError(f"the conversation: {error}; /reset begins anew") from error
            return streamed(partial(answer, model, tokenizer, [prompt], args.max_new_tokens), tokenizer, ends)

        if interactive:
            say(COMMANDS)
        converse(typed(interactive), reply, refused)
