"""The stages as commands: each is a thin cover over a Python call, and reads and writes files."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

from esft.adapters.merge import merge
from esft.checkpoint.load import load_model, load_skeleton, load_tokenizer
from esft.errors import InputError
from esft.experts.moe_layers import moe_layers
from esft.files import read_json, write_json
from esft.outputs import check_apart, check_new_file
from esft.scoring.expert_scores import ExpertScores
from esft.scoring.plot import plot_scores
from esft.scoring.score import score_experts
from esft.scoring.select import select_experts
from esft.selection import ExpertSelection
from esft.swapping.swap import swap
from esft.training.config import TrainConfig
from esft.training.data import encode_all, read_records, windows
from esft.training.evaluate import answer, exact_match, load_any_adapter, mean_loss
from esft.training.loop import train
from esft.training.opened import latest
from esft.training.report import report
from esft.training.run_folder import CONFIG


def _score(args: argparse.Namespace) -> None:
    check_new_file(args.out, ExpertScores.load if args.overwrite else None, [args.model, args.data])
    model, tokenizer = load_model(args.model, args.dtype), load_tokenizer(args.model)
    examples = encode_all(tokenizer, read_records(args.data), args.max_length, args.data)
    # Without a selection the swap only brings the faster experts.
    swap(model, ExpertSelection({}), args.backend)
    batches = windows(examples, args.max_length, args.batch_size)
    scores = score_experts(model, batches, args.max_tokens, progress=not args.quiet)
    scores.save(args.out)
    print(f"scores of {len(scores.token_scores)} layers in {args.out}")


def _select(args: argparse.Namespace) -> None:
    inputs = [args.scores, args.model]
    check_new_file(args.out, ExpertSelection.load if args.overwrite else None, [*inputs, args.plot])
    if args.plot:
        check_new_file(args.plot, _check_plot if args.overwrite else None, [*inputs, args.out])
    scores = ExpertScores.load(args.scores)
    if args.model:
        scores.check({layer.index: layer.num_experts for layer in moe_layers(load_skeleton(args.model))})
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
    overrides = {each.name: getattr(args, each.name) for each in fields(TrainConfig)}
    if not args.resume:  # which may be told the run's own files
        check_apart(args.out, args.config, args.experts)
    begun = latest(args.out).path / CONFIG
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
        inputs = [args.model, args.adapter, args.data]
        check_new_file(args.out, _check_result if args.overwrite else None, inputs)
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


def _check_plot(path: Path) -> None:
    """Raise InputError for a file that is no picture of ``plot_scores``."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if not (head.startswith(b"\x89PNG") and b"Matplotlib" in head):
        raise InputError("not a picture that matplotlib has drawn")


def _check_result(path: Path) -> None:
    """Raise InputError for a file that is no outcome of ``esft eval``."""
    result = read_json(path)
    if not isinstance(result, dict) or not result.keys() >= {"records", "loss", "answers"}:
        raise InputError(f"{path}: not an outcome of esft eval")


def _model_with_adapter(args: argparse.Namespace):
    """The model with its adapter, on our experts where nothing but ESFT has touched them."""
    model = load_model(args.model, args.dtype)
    if args.adapter:
        model = load_any_adapter(model, args.adapter)
    if not hasattr(model, "peft_config"):
        swap(model, ExpertSelection({}), args.backend)
    return model


COMMANDS = {
    "score": _score,
    "select": _select,
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "merge": _merge,
    "report": _report,
}
