"""``esft score``: measure which experts a task uses, into a score file."""

from __future__ import annotations

import argparse

from esft.cli.arguments import count
from esft.cli.inputs import encoder_for, load_for, source_of
from esft.cli.options import DATA, Stages, add_batch_size, add_model, add_stage
from esft.cli.output import say
from esft.errors import reading
from esft.scoring.expert_scores import ExpertScores
from esft.storage.outputs import check_new_file


def add(stages: Stages) -> None:
    sub = add_stage(stages, "score", "measure which experts a task uses")
    add_model(sub, "tokens of a window over the data")
    add_batch_size(sub, 1)
    sub.add_argument("--data", required=True, help=DATA)
    sub.add_argument("--out", required=True, help="score file (summary.json layout)")
    sub.add_argument("--max-tokens", type=count, default=131_072, help="stop after so many (default 131,072)")
    sub.add_argument("--overwrite", action="store_true")


def run(args: argparse.Namespace) -> None:
    source = source_of(args.data)
    check_new_file(args.out, ExpertScores.load if args.overwrite else None, [args.model, source.local])
    from esft.data.batches import windows
    from esft.data.cache import encoded
    from esft.scoring.score import score_experts

    with reading(args.model):
        encoder = encoder_for(args)
        examples = encoded(source, encoder, progress=not args.quiet)
        model = load_for(args, None)
        batches = windows(examples, encoder.max_length, args.batch_size)
        scores = score_experts(model, batches, args.max_tokens, progress=not args.quiet)
    scores.save(args.out)
    say(f"scores of {len(scores.token_scores)} layers in {args.out}")
