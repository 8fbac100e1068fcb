"""``esft generate``: answer prompts."""

from __future__ import annotations

import argparse

from esft.cli.arguments import count
from esft.cli.inputs import adapter_of, load_for
from esft.cli.options import Stages, add_inference, add_stage
from esft.cli.output import say
from esft.errors import reading


def add(stages: Stages) -> None:
    sub = add_stage(stages, "generate", "answer prompts")
    add_inference(sub, "tokens that a prompt may have; longer ones are refused")
    sub.add_argument("--prompt", action="append", required=True, help="may be repeated")
    sub.add_argument("--max-new-tokens", type=count, default=128)


def run(args: argparse.Namespace) -> None:
    from esft.checkpoint.load import load_tokenizer
    from esft.checkpoint.source import Reach, open_config
    from esft.data.records import Record
    from esft.training.evaluate import answer, encode_prompts

    adapter = adapter_of(args)
    prompts = [Record([{"role": "user", "content": text}]) for text in args.prompt]
    with reading(args.model):
        reach = Reach.of(open_config(args.model, args.trust_remote_code))
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        encode_prompts(tokenizer, prompts, reach, reach.length(args.max_length))  # before the model is loaded
        replies = answer(load_for(args, adapter), tokenizer, prompts, args.max_new_tokens, args.batch_size)
    for text, reply in zip(args.prompt, replies, strict=True):
        say(text, *f"    {reply}".split("\n"))
