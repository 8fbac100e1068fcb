"""The stages as commands: each is a thin cover over a Python call, and reads and writes files.

What is heavy to import is imported in the functions, after the checks that do without it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from esft.cli.output import hush_libraries, say, say_marked
from esft.errors import InputError, reading
from esft.runs.config import TrainConfig
from esft.scoring.expert_scores import ExpertScores
from esft.selection import ExpertSelection
from esft.storage.files import write_json
from esft.storage.outputs import check_apart, check_new_file
from esft.storage.reading import read_json


def _score(args: argparse.Namespace) -> None:
    source = _source(args.data)
    check_new_file(args.out, ExpertScores.load if args.overwrite else None, [args.model, source.local])
    from esft.data.batches import windows
    from esft.data.cache import encoded
    from esft.scoring.score import score_experts

    with reading(args.model):
        encoder = _encoder(args)
        examples = encoded(source, encoder, progress=not args.quiet)
        model = _model_with_adapter(args, None)
        batches = windows(examples, encoder.max_length, args.batch_size)
        scores = score_experts(model, batches, args.max_tokens, progress=not args.quiet)
    scores.save(args.out)
    say(f"scores of {len(scores.token_scores)} layers in {args.out}")


def _select(args: argparse.Namespace) -> None:
    inputs = [args.scores, args.model]
    check_new_file(args.out, ExpertSelection.load if args.overwrite else None, [*inputs, args.plot])
    if args.plot is not None:
        check_new_file(args.plot, _check_plot if args.overwrite else None, [*inputs, args.out])
    from esft.scoring.select import select_experts

    scores = ExpertScores.load(args.scores)
    if args.model is not None:
        _check_model(args, scores)
    chosen = select_experts(scores, args.by, args.top_p)
    selection = replace(chosen, shared_experts=args.shared_experts, non_expert_modules=args.non_expert_modules)
    if args.plot is not None:
        from esft.scoring.plot import plot_scores

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


def _train(args: argparse.Namespace) -> None:
    overrides = {each.name: getattr(args, each.name) for each in fields(TrainConfig)}
    settings = args.config
    if not args.resume:  # a run that goes on may be told its own files
        check_apart(args.out, args.config, args.experts)
    elif settings is None:
        from esft.runs.opened import latest

        begun = latest(args.out).path / "config.yaml"
        settings = begun if begun.is_file() else None
    config = TrainConfig.load(settings, **overrides)
    selection = ExpertSelection.load(args.experts) if args.experts is not None else None
    if selection is None and config.method == "esft" and not args.resume:
        raise InputError("--method esft needs an expert selection: --experts")
    for data in (*args.data, args.eval_data):
        if data is not None:
            _source(data)
    from esft.training.loop import train

    with reading(args.model):
        result = train(
            args.model, args.data, args.out, config, selection, args.eval_data, args.resume, args.overwrite,
            progress=not args.quiet, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
    say(
        f"loss {result.train_loss:.3f}, {result.trained_parameters:,} parameters trained, "
        f"{result.stored_bytes:,} bytes stored, {result.seconds:.0f} s, run in {args.out}"
    )


def _data(args: argparse.Namespace) -> None:
    names = {each.name for each in fields(TrainConfig)} & vars(args).keys()
    config = TrainConfig.load(args.config, **{name: getattr(args, name) for name in names})
    from esft.checkpoint.load import load_tokenizer
    from esft.checkpoint.source import Reach, open_config
    from esft.data.report import pieces
    from esft.training.run_data import RunData, sources_of

    sources = sources_of(args.paths)
    for source in sources:
        source.check()
    with reading(args.model):
        reach = Reach.of(open_config(args.model, args.trust_remote_code))
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        run_data = RunData(sources, tokenizer, reach, replace(config, streaming=False)).read(not args.quiet)
        say(f"{run_data.name}: {run_data.report()}")
        for example in (run_data.examples or [])[: args.show]:
            say("")
            say_marked(pieces(tokenizer, example))


def _eval(args: argparse.Namespace) -> None:
    source = _source(args.data)
    if args.out is not None:
        inputs = [args.model, args.adapter, source.local]
        check_new_file(args.out, _check_result if args.overwrite else None, inputs)
    from esft.data.encoding import encode_all
    from esft.data.sources import read_records
    from esft.evaluation.loss import mean_loss
    from esft.evaluation.scores import exact_match

    adapter, records = _adapter(args), read_records(source)[: args.limit]
    with reading(args.model):
        encoder = _encoder(args)
        examples, tokenizer = encode_all(encoder, records, source.name, progress=not args.quiet), encoder.tokenizer
        model = _model_with_adapter(args, adapter)
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


def _generate(args: argparse.Namespace) -> None:
    from esft.checkpoint.load import load_tokenizer
    from esft.checkpoint.source import Reach, open_config
    from esft.data.records import Record
    from esft.evaluation.answers import answer, encode_prompts

    adapter = _adapter(args)
    prompts = [Record([{"role": "user", "content": text}]) for text in args.prompt]
    with reading(args.model):
        reach = Reach.of(open_config(args.model, args.trust_remote_code))
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        encode_prompts(tokenizer, prompts, reach, reach.length(args.max_length))  # before the model is loaded
        replies = answer(_model_with_adapter(args, adapter), tokenizer, prompts, args.max_new_tokens)
    for text, reply in zip(args.prompt, replies, strict=True):
        say(text, *f"    {reply}".split("\n"))


def _merge(args: argparse.Namespace) -> None:
    from esft.adapters.merge import merge

    adapter = _adapter(args)
    with reading(args.model):
        merged = merge(args.model, adapter, args.out, args.overwrite, args.trust_remote_code)
    say(f"merged checkpoint in {merged}")


def _report(args: argparse.Namespace) -> None:
    from esft.runs.report import report

    with reading(args.run):
        say(*report(args.run).split("\n"))


def _plan(args: argparse.Namespace) -> None:
    selection = ExpertSelection.load(args.experts) if args.experts else None
    names = {each.name for each in fields(TrainConfig)} & vars(args).keys() - {"frozen"}
    config = TrainConfig.load(None, **{name: getattr(args, name) for name in names})
    from esft.planning.advice import GB, advice, described, fitting
    from esft.planning.plan import FORMATS, Plan, plan

    def planned(config: TrainConfig, frozen: str, tokens: int) -> Plan:
        return plan(
            args.model, selection, config, frozen=frozen, tokens=tokens, top_p=args.top_p,
            experts=args.experts_per_layer, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip

    with reading(args.model):
        for frozen in FORMATS if args.frozen == "all" else (args.frozen,):
            found, changes = planned(config, frozen, args.tokens), None
            if args.memory_gb and found.peak > args.memory_gb * GB:
                changes = advice(planned, config, found.frozen, args.tokens, args.memory_gb * GB)
            if args.json:
                fits = {"fits": changes is None, "change": changes} if args.memory_gb else {}
                say(json.dumps(vars(found) | fits))
            else:
                say(*described(found).split("\n"))
                if args.memory_gb:
                    say(fitting(args.memory_gb, changes))


def _check_plot(path: Path) -> None:
    """Raise InputError for a file that is no picture of ``plot_scores``."""
    content = path.read_bytes()
    if not content.startswith((b"\x89PNG", b"%PDF", b"<?xml")) or b"Matplotlib" not in content:
        raise InputError("not a picture that matplotlib has drawn")


def _check_result(path: Path) -> None:
    """Raise InputError for a file that is no outcome of ``esft eval``."""
    result = read_json(path)
    if not isinstance(result, dict) or not result.keys() >= {"records", "loss", "answers"}:
        raise InputError(f"{path}: not an outcome of esft eval")


def _adapter(args: argparse.Namespace) -> Path | None:
    from esft.adapters.load_any import adapter_folder

    return adapter_folder(args.adapter) if args.adapter is not None else None


def _source(text: str) -> Any:
    """The source of records that an option names, which is there."""
    from esft.data.sources import DataSource

    source = DataSource.of(text)
    source.check()
    return source


def _encoder(args: argparse.Namespace) -> Any:
    """What makes tokens of records for ``--model``."""
    from esft.checkpoint.load import load_tokenizer
    from esft.checkpoint.source import Reach, open_config
    from esft.data.encoding import Encoder

    reach = Reach.of(open_config(args.model, args.trust_remote_code))
    length = reach.length(args.max_length)
    return Encoder(load_tokenizer(args.model, args.trust_remote_code), length, reach.vocabulary)


def _model_with_adapter(args: argparse.Namespace, adapter: Path | None) -> Any:
    from esft.adapters.load_any import load_with_adapter

    return load_with_adapter(
        args.model, adapter, args.frozen, args.dtype, args.backend, args.trust_remote_code, not args.quiet,
        args.frozen_linear,
    )  # fmt: skip


def run_stage(args: argparse.Namespace) -> None:
    """Run the stage that a command line names."""
    if getattr(args, "quiet", False):
        hush_libraries()
    COMMANDS[args.stage](args)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "score": _score,
    "select": _select,
    "train": _train,
    "data": _data,
    "plan": _plan,
    "eval": _eval,
    "generate": _generate,
    "merge": _merge,
    "report": _report,
}
