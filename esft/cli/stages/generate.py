"""``esft generate``: answer prompts, all with one adapter or each with its own."""

from __future__ import annotations

import argparse
import os

from esft.cli.arguments import count
from esft.cli.inputs import check_alike, load_for
from esft.cli.options import Stages, add_batch_size, add_model, add_stage
from esft.cli.output import say
from esft.errors import InputError, reading
from esft.storage.reading import shown


def add(stages: Stages) -> None:
    sub = add_stage(stages, "generate", "answer prompts")
    add_model(sub, "tokens that a prompt may have; longer ones are refused")
    add_batch_size(sub, 64)
    sub.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]FOLDER",
        help="adapter folder, ESFT's or PEFT's, or that of a run which holds one; of ESFT's several with names",
    )  # fmt: skip
    sub.add_argument(
        "--prompt", action="append", required=True, metavar="[NAME:]TEXT",
        help="may be repeated; where adapters have names, with the name of one or __base__ before it",
    )  # fmt: skip
    sub.add_argument("--max-new-tokens", type=count, default=128, help="tokens of an answer (default 128)")


def run(args: argparse.Namespace) -> None:
    from esft.adapters.load_any import adapter_folder
    from esft.adapters.mixed import load_adapters
    from esft.checkpoint.load import load_tokenizer
    from esft.checkpoint.source import Reach, open_config
    from esft.data.encoding import Encoder
    from esft.data.records import Record
    from esft.evaluation.answers import answer, encode_prompts

    adapters = {name: adapter_folder(path) for name, path in _named(args.adapter).items()}
    single = adapters.pop("", None)
    texts, names = args.prompt, None
    if adapters:
        names, texts = zip(*(_split(prompt, [*adapters, "__base__"]) for prompt in args.prompt), strict=True)
    prompts = [Record([{"role": "user", "content": text}]) for text in texts]
    with reading(args.model):
        reach = Reach.of(open_config(args.model, args.trust_remote_code))
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        check_alike(Encoder(tokenizer, None, reach.vocabulary))
        encode_prompts(tokenizer, prompts, reach, reach.length(args.max_length))  # before the model is loaded
        model = load_for(args, single)
        if adapters:
            load_adapters(model, adapters)
        replies = answer(model, tokenizer, prompts, args.max_new_tokens, args.batch_size, adapter_names=names)
    for text, reply in zip(args.prompt, replies, strict=True):
        say(text, *f"    {reply}".split("\n"))


def _named(given: list[str]) -> dict[str, str]:
    """Folders by name; of a single one that has none, the name is empty."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or os.path.lexists(text):
            name, path = "", text
        elif not name:
            raise InputError(f"--adapter {shown(text)}: has no name before =")
        if name in found and name:
            raise InputError(f"--adapter {shown(text)}: the name {shown(name)} is taken")
        if not name and len(given) > 1:
            raise InputError(f"--adapter {shown(text)}: of several adapters each needs a name: NAME=FOLDER")
        found[name] = path
    return found


def _split(prompt: str, names: list[str]) -> tuple[str, str]:
    """The name of a prompt's adapter, and its text."""
    name, colon, text = prompt.partition(":")
    if not colon or name not in names:
        known = ", ".join(names)
        raise InputError(f"--prompt {shown(prompt)}: begins with no adapter's name and a colon; there are {known}")
    return name, text
