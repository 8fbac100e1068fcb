"""``esft eval``: loss and exact match of a model, with an adapter or without."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from esft.cli.arguments import count
from esft.cli.inputs import adapter_of, encoder_for, load_for, source_of
from esft.cli.options import DATA, Stages, add_inference, add_stage
from esft.cli.output import say
from esft.errors import InputError, reading
from esft.storage.files import write_json
from esft.storage.outputs import check_new_file
from esft.storage.reading import read_json


def add(stages: Stages) -> None:
    sub = add_stage(stages, "eval", "loss and exact match on chat records")
    add_inference(sub, "tokens of a record; longer ones are cut")
    sub.add_argument("--data", required=True, help=DATA)
    sub.add_argument("--limit", type=count, help="only the first records")
    sub.add_argument("--loss-only", action="store_true", help="do not generate answers")
    sub.add_argument("--out", help="also write the figures and every answer as JSON")
    sub.add_argument("--overwrite", action="store_true")


def run(args: argparse.Namespace) -> None:
    source = source_of(args.data)
    if args.out is not None:
        inputs = [args.model, args.adapter, source.local]
        check_new_file(args.out, _check_result if args.overwrite else None, inputs)
    from esft.data.encoding import encode_all
    from esft.data.sources import read_records
    from esft.training.evaluate import exact_match, mean_loss

    adapter, records = adapter_of(args), read_records(source)[: args.limit]
    with reading(args.model):
        encoder = encoder_for(args)
        examples, tokenizer = encode_all(encoder, records, source.name, progress=not args.quiet), encoder.tokenizer
        model = load_for(args, adapter)
        loss = mean_loss(model, examples, tokenizer.pad_token_id, args.batch_size)
        if not math.isfinite(loss):
            source = args.model if adapter is None else f"{args.model} with {adapter}"
            raise InputError(f"{source}: loss on {args.data} is {loss}: weights hold what is no number, or too much")
        result: dict[str, Any] = {"records": len(records), "loss": loss}
        outcomes = []
        if not args.loss_only:
            result["exact_match"], outcomes = exact_match(model, tokenizer, records, args.batch_size, not args.quiet)
    say(json.dumps(result, allow_nan=False))
    if args.out is not None:
        write_json(args.out, result | {"answers": outcomes})


def _check_result(path: Path) -> None:
    """Raise InputError for a file that is no outcome of ``esft eval``."""
    result = read_json(path)
    if not isinstance(result, dict) or not result.keys() >= {"records", "loss", "answers"}:
        raise InputError(f"{path}: not an outcome of esft eval")
