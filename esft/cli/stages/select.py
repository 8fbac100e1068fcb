"""``esft select``: choose the experts to train, from their scores."""

from __future__ import annotations

import argparse
from dataclasses import replace

from esft.cli.arguments import budget, count, factor, first_layer, picture, share
from esft.cli.options import Stages, add_stage, add_trust
from esft.cli.output import say
from esft.errors import InputError, reading
from esft.scoring.expert_scores import RULES, ExpertScores
from esft.selection import ExpertSelection
from esft.storage.outputs import check_new_file


def add(stages: Stages) -> None:
    sub = add_stage(stages, "select", "choose the experts to train from their scores")
    sub.add_argument("--scores", required=True, help="of the task, what esft score wrote")
    sub.add_argument("--by", choices=RULES, default="token", help="which scores (default token); see docs/selection.md")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--top-p", type=share, default=0.2, help="share of a layer's scores to reach (default 0.2)")
    size.add_argument("--experts-per-layer", type=count, metavar="N", help="so many in each layer instead")
    size.add_argument("--budget", type=budget, metavar="N", help="so many over all layers, or a share of all as 15%%")
    size.add_argument("--like", metavar="FILE", help="as many in each layer as this selection has, and the same beside")
    sub.add_argument("--against", metavar="SCORES", help="of general text: its shares are taken off the task's")
    sub.add_argument("--weight", type=factor, metavar="L", help="of general text, with --against (default 1)")
    sub.add_argument("--layers", type=first_layer, default=0, metavar="FROM:", help="only layers from this one on")
    sub.add_argument("--out", required=True, help="selection file (expert_cfg.json layout)")
    sub.add_argument("--model", help="check that the scores are of this model")
    sub.add_argument("--shared-experts", action="store_true", help="train the shared experts as well")
    sub.add_argument("--non-expert-modules", action="store_true", help="train everything that is no expert as well")
    sub.add_argument("--plot", type=picture, metavar="PNG", help="also draw the scores with the chosen experts marked")
    sub.add_argument("--overwrite", action="store_true", help="replace a selection file and a picture")
    add_trust(sub)


def run(args: argparse.Namespace) -> None:
    if args.weight is not None and args.against is None:
        raise InputError("--weight goes with --against")
    everywhere = {"--shared-experts": args.shared_experts, "--non-expert-modules": args.non_expert_modules}
    if args.layers and (named := [option for option, given in everywhere.items() if given]):
        raise InputError(f"--layers and {named[0]} do not go together: these train in all layers")
    inputs = [args.scores, args.model, args.against, args.like]
    check_new_file(args.out, ExpertSelection.load if args.overwrite else None, [*inputs, args.plot])
    from esft.scoring.plot import check_plot, plot_scores

    if args.plot is not None:
        check_new_file(args.plot, check_plot if args.overwrite else None, [*inputs, args.out])
    from esft.scoring.select import select_experts

    scores = ExpertScores.load(args.scores)
    if args.model is not None:
        _check_model(args, scores)
    like = ExpertSelection.load(args.like) if args.like is not None else None
    chosen = select_experts(
        scores,
        args.by,
        args.top_p,
        experts_per_layer=args.experts_per_layer,
        budget=args.budget,
        like=like,
        against=ExpertScores.load(args.against) if args.against is not None else None,
        weight=1.0 if args.weight is None else args.weight,
        first_layer=args.layers,
    )
    beside = like or ExpertSelection({})
    selection = replace(
        chosen,
        shared_experts=args.shared_experts or beside.shared_experts,
        non_expert_modules=args.non_expert_modules or beside.non_expert_modules,
    )
    if args.plot is not None:
        plot_scores(scores, selection, args.plot, by=args.by)
    selection.save(args.out)
    for layer, ids in selection.experts.items():
        say(f"layer {layer}: {ids}")
    total = sum(len(experts) for experts in scores.token_scores.values())
    say(f"{selection.num_experts} of {total} experts in {args.out}")


def _check_model(args: argparse.Namespace, scores: ExpertScores) -> None:
    from esft.checkpoint.load import load_skeleton
    from esft.experts.moe_layers import moe_layers

    with reading(args.model):
        layers = moe_layers(load_skeleton(args.model, args.trust_remote_code))
    scores.check({layer.index: layer.num_experts for layer in layers})
    chosen = ExpertSelection({}, shared_experts=args.shared_experts)
    chosen.check({}, any(layer.shared_experts for layer in layers))
