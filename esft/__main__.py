"""The ``esft`` command: every stage as files. Each subcommand is a thin cover over a Python call."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from esft.adapter import SELECTION, WEIGHTS
from esft.arguments import Parser, count
from esft.checkpoint import load_model, load_tokenizer
from esft.config import METHODS, TrainConfig
from esft.data import encode_all, read_records, windows
from esft.errors import InputError
from esft.evaluate import answer, exact_match, load_any_adapter, mean_loss
from esft.families import moe_layers
from esft.files import check_new_file, write_json
from esft.merge import merge
from esft.report import plot_scores, report
from esft.score import ExpertScores, score_experts
from esft.select import ExpertSelection, select_experts
from esft.swap import swap
from esft.train import CONFIG, train


def keep_memory() -> None:
    """Make this process keep the memory that it has freed.

    glibc gives large blocks back to the system and takes them anew at every step; on a virtual machine the page faults
    of that can cost several times the arithmetic.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def _score(args: argparse.Namespace) -> None:
    check_new_file(args.out, args.overwrite)
    model, tokenizer = load_model(args.model, args.dtype), load_tokenizer(args.model)
    examples = encode_all(tokenizer, read_records(args.data), args.max_length, args.data)
    # Without a selection the swap only brings the faster experts.
    swap(model, ExpertSelection({}), args.backend)
    batches = windows(examples, args.max_length, args.batch_size)
    scores = score_experts(model, batches, args.max_tokens)
    scores.save(args.out)
    print(f"scores of {len(scores.token_scores)} layers in {args.out}")


def _select(args: argparse.Namespace) -> None:
    check_new_file(args.out, args.overwrite)
    if args.plot:
        check_new_file(args.plot, args.overwrite)
    scores = ExpertScores.load(args.scores)
    if args.model:
        scores.check({layer.index: layer.num_experts for layer in moe_layers(load_model(args.model))})
    chosen = select_experts(scores, args.by, args.top_p)
    selection = replace(chosen, shared_experts=args.shared_experts, non_expert_modules=args.non_expert_modules)
    if args.plot:
        plot_scores(scores, selection, args.plot, by=args.by)
    selection.save(args.out)
    for layer, ids in selection.experts.items():
        print(f"layer {layer}: {ids}")
    total = sum(len(experts) for experts in scores.token_scores.values())
    print(f"{selection.num_experts} of {total} experts in {args.out}")


def _train(args: argparse.Namespace) -> None:
    overrides = {name: getattr(args, name) for name in ("method", "lr", "steps", "batch_size", "max_length")}
    overrides |= {
        name: getattr(args, name) for name in ("seed", "dtype", "backend", "recompute", "warmup_steps", "decay")
    }
    begun = Path(args.out) / CONFIG
    resumes = args.resume and not args.config and begun.is_file()
    config = TrainConfig.load(begun if resumes else args.config, **overrides)
    selection = ExpertSelection.load(args.experts) if args.experts else None
    result = train(
        args.model, args.data, args.out, config, selection, args.eval_data, args.resume, args.overwrite,
        progress=not args.quiet,
    )  # fmt: skip
    print(
        f"loss {result.train_loss:.3f}, {result.trained_parameters:,} parameters trained, "
        f"{result.stored_bytes:,} bytes stored, {result.seconds:.0f} s, run in {args.out}"
    )


def _eval(args: argparse.Namespace) -> None:
    if args.out:
        check_new_file(args.out, args.overwrite)
    model, tokenizer = _model_with_adapter(args), load_tokenizer(args.model)
    records = read_records(args.data)[: args.limit]
    examples = encode_all(tokenizer, records, args.max_length, args.data)
    result = {"records": len(records), "loss": mean_loss(model, examples, tokenizer.pad_token_id, args.batch_size)}
    outcomes = []
    if not args.loss_only:
        result["exact_match"], outcomes = exact_match(model, tokenizer, records, args.batch_size, not args.quiet)
    print(json.dumps(result))
    if args.out:
        write_json(args.out, result | {"answers": outcomes})


def _generate(args: argparse.Namespace) -> None:
    model, tokenizer = _model_with_adapter(args), load_tokenizer(args.model)
    prompts = [[{"role": "user", "content": text}] for text in args.prompt]
    for text, reply in zip(args.prompt, answer(model, tokenizer, prompts, args.max_new_tokens), strict=True):
        print(f"{text}\n    {reply}")


def _merge(args: argparse.Namespace) -> None:
    print(f"merged checkpoint in {merge(args.model, args.adapter, args.out, args.overwrite)}")


def _report(args: argparse.Namespace) -> None:
    print(report(args.run))


def _model_with_adapter(args: argparse.Namespace):
    """The model with its adapter, on our experts where nothing but ESFT has touched them."""
    model = load_model(args.model, args.dtype)
    if args.adapter:
        model = load_any_adapter(model, args.adapter)
    if not hasattr(model, "peft_config"):
        swap(model, ExpertSelection({}), args.backend)
    return model


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="esft", description="Expert-Specialized Fine-Tuning of MoE models")
    stages = parser.add_subparsers(required=True, metavar="stage")

    def stage(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = stages.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    def common(sub: argparse.ArgumentParser, max_length: int | None = 4096, batch_size: int | None = 32) -> None:
        sub.add_argument("--model", required=True, help="checkpoint folder or hub id")
        sub.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), help="auto is the checkpoint's")
        sub.add_argument("--backend", choices=("auto", "triton", "cpu", "reference"), help="of the experts")
        sub.add_argument("--max-length", type=count, default=max_length, metavar="TOKENS")
        sub.add_argument("--batch-size", type=count, default=batch_size)

    def inference(sub: argparse.ArgumentParser) -> None:
        common(sub, batch_size=64)
        sub.set_defaults(dtype="auto", backend="auto")
        sub.add_argument("--adapter", help="adapter folder, ESFT's or PEFT's")

    sub = stage("score", _score, "measure which experts a task uses")
    common(sub, batch_size=1)
    sub.set_defaults(dtype="auto", backend="auto")
    sub.add_argument("--data", required=True, help="JSONL chat records")
    sub.add_argument("--out", required=True, help="score file (summary.json layout)")
    sub.add_argument("--max-tokens", type=count, default=131_072)
    sub.add_argument("--overwrite", action="store_true")

    sub = stage("select", _select, "choose the experts to train from their scores")
    sub.add_argument("--scores", required=True)
    sub.add_argument("--by", choices=("token", "gate"), default="token")
    sub.add_argument("--top-p", type=float, default=0.2)
    sub.add_argument("--out", required=True, help="selection file (expert_cfg.json layout)")
    sub.add_argument("--model", help="check that the scores are of this model")
    sub.add_argument("--shared-experts", action="store_true", help="train the shared experts as well")
    sub.add_argument("--non-expert-modules", action="store_true", help="train everything that is no expert as well")
    sub.add_argument("--plot", metavar="PNG", help="also draw the scores with the chosen experts marked")
    sub.add_argument("--overwrite", action="store_true")

    sub = stage("train", _train, "fine-tune on chat records")
    common(sub, max_length=None, batch_size=None)
    sub.add_argument("--data", required=True, help="JSONL chat records")
    sub.add_argument("--eval-data", help="JSONL chat records whose loss is watched")
    sub.add_argument("--experts", help="selection file, for method esft")
    sub.add_argument("--out", required=True, help="run folder")
    sub.add_argument("--config", help="YAML settings; the arguments here override it")
    sub.add_argument("--method", choices=METHODS)
    sub.add_argument("--recompute", choices=("none", "frozen"), help="frozen: keep less, compute more")
    sub.add_argument("--lr", type=float)
    sub.add_argument("--steps", type=int)
    sub.add_argument("--warmup-steps", type=int)
    sub.add_argument("--decay", type=float, metavar="SHARE")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    sub.add_argument("--quiet", action="store_true")

    sub = stage("eval", _eval, "loss and exact match on chat records")
    inference(sub)
    sub.add_argument("--data", required=True)
    sub.add_argument("--limit", type=count, help="only the first records")
    sub.add_argument("--loss-only", action="store_true", help="do not generate answers")
    sub.add_argument("--out", help="also write the figures and every answer as JSON")
    sub.add_argument("--overwrite", action="store_true")
    sub.add_argument("--quiet", action="store_true")

    sub = stage("generate", _generate, "answer prompts")
    inference(sub)
    sub.add_argument("--prompt", action="append", required=True, help="may be repeated")
    sub.add_argument("--max-new-tokens", type=count, default=128)

    sub = stage("merge", _merge, "write a checkpoint with an adapter merged in")
    sub.add_argument("--model", required=True, help="base checkpoint folder")
    sub.add_argument("--adapter", required=True, help=f"folder with {SELECTION} and {WEIGHTS}")
    sub.add_argument("--out", required=True)
    sub.add_argument("--overwrite", action="store_true")

    sub = stage("report", _report, "show what a run did")
    sub.add_argument("run", help="run folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage. Returns the exit status: 0, or 2 after a one-line error for bad input."""
    args = _parser().parse_args(arguments)
    try:
        args.function(args)
    except InputError as error:
        print(f"esft: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"esft: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def entry() -> None:
    """What the installed ``esft`` script calls."""
    keep_memory()
    sys.exit(main())


if __name__ == "__main__":
    entry()
