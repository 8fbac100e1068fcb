"""``esft eval``: what a model does on records, with an adapter or without."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from esft.cli.arguments import count
from esft.cli.inputs import adapter_of, check_alike, encoder_for, load_for, named, source_of
from esft.cli.options import DATA, Stages, add_inference, add_stage
from esft.cli.output import say
from esft.errors import InputError, reading
from esft.reporting.answers import Evaluation
from esft.runs.config import SCORES, scores_named
from esft.storage.files import write_json
from esft.storage.outputs import check_new_file
from esft.storage.reading import read_json


def add(stages: Stages) -> None:
    sub = add_stage(stages, "eval", "loss, exact match and other scores on records")
    add_inference(sub, "tokens of a record; longer ones are cut")
    sub.add_argument("--data", required=True, action="append", help=f"{DATA}; again for more, NAME=DATA each")
    sub.add_argument("--limit", type=count, help="only the first records of each")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--metrics", default="loss,exact_match", help=f"with commas: of {', '.join(SCORES)}")
    what.add_argument("--loss-only", dest="metrics", action="store_const", const="loss", help="generate no answers")
    sub.add_argument("--out", help="also write the figures and every answer as JSON")
    sub.add_argument("--overwrite", action="store_true", help="replace what esft eval wrote")


def run(args: argparse.Namespace) -> None:
    scores = scores_named(args.metrics, "--metrics")
    sources = {name: source_of(text) for name, text in named(args.data, "--data").items()}
    if args.out is not None:
        inputs = [args.model, args.adapter, *(source.local for source in sources.values())]
        check_new_file(args.out, _check_result if args.overwrite else None, inputs)
    from esft.checkpoint.source import Reach, open_config
    from esft.data.encoding import encode_all
    from esft.data.sources import read_records
    from esft.evaluation.scores import EvalSet
    from esft.parallel.join import current

    adapter = adapter_of(args)
    with reading(args.model):
        encoder, sets = encoder_for(args), []
        check_alike(encoder, sources.values())
        reach = Reach.of(open_config(args.model, args.trust_remote_code))
        for name, source in sources.items():
            records = read_records(source)[: args.limit]
            examples = encode_all(encoder, records, source.name, progress=not args.quiet) if "loss" in scores else ()
            sets.append(EvalSet(name, source.name, examples, records))
            sets[-1].check(encoder.tokenizer, reach, scores)
        model = load_for(args, adapter)
        results = {}
        for each in sets:
            figures, answers = _measured(args, model, encoder.tokenizer, each, scores)
            if (loss := figures.get("loss")) is not None and not math.isfinite(loss):
                source = args.model if adapter is None else f"{args.model} with {adapter}"
                what = "weights hold what is no number, or too much"
                raise InputError(f"{source}: loss on {each.source} is {loss}: {what}")
            results[each.name] = figures, answers
    if args.out is not None and current().main:  # before it is printed, for readers who have gone meanwhile
        write_json(args.out, _joined({name: each | {"answers": answers} for name, (each, answers) in results.items()}))
    say(json.dumps(_joined({name: figures for name, (figures, _) in results.items()}), allow_nan=False))


def _measured(
    args: argparse.Namespace, model: Any, tokenizer: Any, data: Any, scores: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of one set, and its answers."""
    from esft.evaluation.scores import measure
    from esft.evaluation.text_scores import share_by_field

    found = measure(model, tokenizer, data, scores, args.batch_size, not args.quiet)
    figures: dict[str, Any] = {"records": len(data.records), **found.scores}
    if "json_match" in found.scores:
        figures["json_fields"] = share_by_field([(each["given"], each["expected"]) for each in found.answers])
    return figures, found.answers


def _joined(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of one set as they are, those of several by their names."""
    return results.get("", {"data": results})


def _check_result(path: Path) -> None:
    """Raise InputError for a file that is no outcome of ``esft eval``, of one set or of several."""
    result = read_json(path)
    several = result["data"] if isinstance(result, dict) and result.keys() == {"data"} else None
    for part in several.values() if several and isinstance(several, dict) else [result]:
        Evaluation.of(part, path)
