"""``esft score``: measure which experts a task uses, into a score file."""

from __future__ import annotations

import argparse
from dataclasses import replace

from esft.cli.arguments import count
from esft.cli.inputs import adapter_of, check_alike, encoder_for, load_for, source_of
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
    sub.add_argument("--outputs", action="store_true", help="also score what the experts put out, for --by output")
    sub.add_argument(
        "--gradients",
        action="store_true",
        help="also score their gradients over batches of records, for --by fisher and --by fisher_rows",
    )
    sub.add_argument("--adapter", help="score the base with this adapter, or a run's: to select again after a warm-up")
    sub.add_argument("--overwrite", action="store_true", help="replace a score file")


def run(args: argparse.Namespace) -> None:
    source = source_of(args.data)
    check_new_file(args.out, ExpertScores.load if args.overwrite else None, [args.model, args.adapter, source.local])
    from esft.data.batches import collate, epoch_batches, windows
    from esft.data.cache import encoded
    from esft.evaluation.loss import batch_loss
    from esft.parallel.join import current
    from esft.scoring.gradients import gradient_scores
    from esft.scoring.score import score_experts

    adapter = adapter_of(args)
    with reading(args.model):
        encoder = encoder_for(args)
        check_alike(encoder, [source])
        with current().main_first():  # who leaves them encoded for the others
            examples = encoded(source, encoder, progress=not args.quiet)
        model = load_for(args, adapter)
        batches = windows(examples, encoder.max_length, args.batch_size)
        scores = score_experts(model, batches, args.max_tokens, not args.quiet, args.outputs)
        if args.gradients:
            order, pad = epoch_batches(examples, args.batch_size, seed=0, epoch=0), encoder.tokenizer.pad_token_id
            records = (collate([examples[i] for i in batch], pad) for batch in order)
            fisher, by_rows = gradient_scores(model, records, batch_loss, args.max_tokens, not args.quiet)
            scores = replace(scores, fisher_scores=fisher, fisher_rows_scores=by_rows)
    if current().main:
        scores.save(args.out)
    say(f"scores of {len(scores.token_scores)} layers in {args.out}")
