"""Benchmarks of the experts' kernels.

    python -m benchmarks layer    [--device cpu|cuda] [--shapes tiny,deepseek-v2-lite] [--tokens 2048]
    python -m benchmarks step     [--model examples/tiny-moe] [--records 32] [--length 64]
    python -m benchmarks methods  [--out build/methods] [--seeds 3] [--smoke]
    python -m benchmarks routing  [--out build/methods]
    python -m benchmarks data     [--records 50000] [--words 80] [--processes 2] [--data train.jsonl]
    python -m benchmarks gpu      [--out build/gpu] [--shapes deepseek-v2-lite] [--minutes 10]
    python -m benchmarks gpu-steps [--out build/gpu-steps] [--models olmoe-1b-7b] [--minutes 10]
    python -m benchmarks tune     [--out tiles.json] [--shapes deepseek-v2-lite] [--tokens 4096]
    python -m benchmarks scale    --model deepseek-v2-lite --frozen nf4 [--optimizer adamw_8bit] [--memory-gb 24]
    python -m benchmarks plan     [--models olmoe-1b-7b,deepseek-v2-lite] [--experts-per-layer 1]
    python -m benchmarks ranks    [--model examples/tiny-moe] [--processes 1,2,4] [--gpus 8,64]
    python -m benchmarks roofline [--shapes deepseek-v2-lite] [--tokens 16384] [--gpu H100]

``layer`` checks one MoE layer on the device at hand, then times it, and counts its launches; ``step`` times training
steps of a small model, on the GPU where there is one. ``methods`` trains that model by several methods on several
tasks and seeds, which takes hours, and goes on where it was stopped; ``routing`` shows which experts these tasks use.
``data`` times the encoding of records, and says
how much of batches is padding. ``ranks`` times steps of several processes with a core each, and counts what they send.
``scale`` writes a checkpoint of a big model's true sizes and measures every stage on it. ``gpu`` checks and times the
kernels on this machine's GPU, and leaves a page to attach to a report; ``gpu-steps`` does so with whole training steps
of models of true size. ``tune`` tries other tiles there, and writes the
fastest into a file that the kernels find. ``roofline`` computes what the kernels' FLOPs and bytes allow on GPUs that
need not be here, ``plan`` what training known models takes; nothing in them is measured. Without a name, ``layer``
runs. Each prints a table for people and JSON for machines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import esft
from benchmarks import (
    data,
    gpu,
    gpu_steps,
    launches,
    layer,
    plan,
    random_checkpoint,
    ranks,
    roofline,
    scale,
    step,
    tune,
)
from benchmarks.methods import routing, study
from benchmarks.shapes import SHAPES, LayerShape
from esft.runs.config import FROZEN, FROZEN_LINEAR, OPTIMIZERS, RECOMPUTES
from esft.runs.report import table
from esft_kernels.triton_ops.tiles import tuned_file

WORKERS = min(os.cpu_count() or 1, 12)  # each has the layer's weights on the GPU


def _rounds(text: str) -> int:
    """How often things are timed: quartiles are of two times and more."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 2 on")
    return int(text)


def _shapes(parser: argparse.ArgumentParser, names: str) -> list[LayerShape]:
    if unknown := [name for name in names.split(",") if name not in SHAPES]:
        parser.error(f"no shape {unknown[0]!r}; there are {', '.join(SHAPES)}")
    return [SHAPES[name] for name in names.split(",")]


def _layer(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks layer", description="check, then time, one MoE layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default="tiny", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=_rounds, default=15)
    parser.add_argument("--peers", help="names of the peers, separated by semicolons, to time; all when not given")
    args = parser.parse_args(argv)
    shapes, device = _shapes(parser, args.shapes), torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: nothing is timed")
    only = set(args.peers.split(";")) if args.peers else None
    rows = [
        row
        for shape in shapes
        for row in layer.run(shape, args.tokens, getattr(torch, args.dtype), device, args.backend, args.rounds, only)
    ]
    print(table(rows))
    counted = [row for shape in shapes for row in launches.rows(shape, args.tokens)]
    print("Counted, not measured: what a layer launches on a GPU with backend triton, from the router's choice on")
    print(table(counted))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "dtype": args.dtype, "measured": rows, "counted": counted}))


def _roofline(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks roofline", description="FLOPs, bytes and the time they allow, computed"
    )
    parser.add_argument("--shapes", default="deepseek-v2-lite", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--gpu", choices=roofline.GPUS, help="show our kernels one by one on this one")
    args = parser.parse_args(argv)
    rows: list[dict] = []
    for shape in _shapes(parser, args.shapes):
        trained = layer.chosen_experts(shape)
        if args.gpu:
            rows += roofline.passes_table(shape, args.tokens, trained, layer.SHARE, args.gpu)
        else:
            rows += roofline.compute(shape, args.tokens, trained, layer.SHARE)
    print(f"Computed, not measured: bf16, {args.tokens} tokens, {layer.SHARE:.0%} of the rows on trained experts")
    print(table(rows))
    print(json.dumps({"dtype": "bfloat16", "tokens": args.tokens, "computed": rows}))


def _plan(argv: list[str]) -> None:
    names = sorted(folder.name for folder in plan.MODELS.iterdir())
    parser = argparse.ArgumentParser(prog="benchmarks plan", description="memory of ESFT on known models, computed")
    parser.add_argument("--models", default=",".join(names), help=f"comma-separated, of {', '.join(names)}")
    parser.add_argument("--experts-per-layer", type=int, help="the paper's share where not given")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.models.split(",") if name not in names]:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(names)}")
    rows = plan.run(args.models.split(","), args.experts_per_layer)
    print("Computed, not measured: peak memory in GB of ESFT on a CPU, 2,048 tokens together")
    print(table(rows))
    print(json.dumps({"computed": rows}))


def _step(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks step", description="check, then time, training steps")
    parser.add_argument("--model", default="examples/tiny-moe", help="checkpoint folder")
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens a record")
    parser.add_argument("--rounds", type=_rounds, default=15)
    parser.add_argument("--peers", help="names of the peers, separated by semicolons; all when not given")
    args = parser.parse_args(argv)
    only = set(args.peers.split(";")) if args.peers else None
    rows = step.run(args.model, args.records, args.length, args.rounds, only)
    print(table(rows))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": name, "threads": torch.get_num_threads(), "measured": rows}))


def _ranks(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks ranks", description="steps of several processes, a core each")
    parser.add_argument("--model", default="examples/tiny-moe", help="checkpoint folder")
    parser.add_argument("--records", type=int, default=64, help="of a step, of all processes")
    parser.add_argument("--length", type=int, default=64, help="tokens a record")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--processes", default="1,2", help="comma-separated; those that have a core each are fair")
    parser.add_argument("--gpus", default="8,64", help="comma-separated, for what is computed")
    args = parser.parse_args(argv)
    sizes, gpus = ([int(text) for text in given.split(",")] for given in (args.processes, args.gpus))
    rows = ranks.run(args.model, args.records, args.length, args.steps, sizes)
    print(table(rows))
    print("Computed, not measured: GB that each GPU sends a step, collectives in a ring, bf16")
    print(table(larger := ranks.computed(sorted(plan.MODELS.iterdir()), gpus)))
    print(json.dumps({"cores": os.cpu_count(), "measured": rows, "computed": larger}))


def _data(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks data", description="seconds to encode records, and padding")
    parser.add_argument("--model", default="examples/tiny-moe", help="folder with a tokenizer")
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--words", type=int, default=80, help="most of a turn; half of it at least")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--data", type=Path, help="also the padding of these records")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row of them")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(argv)
    seconds = data.encoding(args.model, args.records, args.words, args.processes)
    rows = data.padding(args.model, args.data, args.length, args.batch_size)
    print(table([seconds]))
    shares = ("padding", "bfd", "wrapped")
    print(table([row | {name: f"{row[name]:.2%}" for name in shares} for row in rows]))
    print(json.dumps({"encoding": seconds, "padding": rows}))


def _tune(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks tune", description="find the fastest tiles on this GPU")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file in the place of the one where the kernels look; what it holds of other shapes stays",
    )
    parser.add_argument("--shapes", default="deepseek-v2-lite", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=_rounds, default=10)
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile and check tiles")
    args = parser.parse_args(argv)
    shapes = _shapes(parser, args.shapes)
    if not torch.cuda.is_available():
        parser.error("no GPU here: nothing is tuned")
    device = torch.device("cuda")
    out = args.out or tuned_file(device)
    rows = [
        row
        for s in shapes
        for row in tune.run(s, args.tokens, getattr(torch, args.dtype), device, args.rounds, out, args.workers)
    ]
    print(table(rows))
    print(f"Kept in {out}")
    print(json.dumps({"device": torch.cuda.get_device_name(device), "dtype": args.dtype, "measured": rows}))


def _gpu(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks gpu", description="check and time the kernels on this GPU")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of results and page; goes on there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, interpreted")
    known = f"comma-separated, of {', '.join(SHAPES)}"
    parser.add_argument("--shapes", default="deepseek-v2-lite,qwen3-30b-a3b,gpt-oss-20b", help=known)
    parser.add_argument("--tokens", default="4096,16384", help="comma-separated")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=_rounds, default=10)
    parser.add_argument("--tiles", type=int, default=6, help="of an op to check, the chosen ones first")
    parser.add_argument("--minutes", type=float, default=10.0, help="no new part after so many")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile and check tiles")
    args = parser.parse_args(argv)
    shapes, device, dtype = _shapes(parser, args.shapes), torch.device(args.device), getattr(torch, args.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: nothing is timed")
    if not all(count.isdecimal() for count in args.tokens.split(",")):
        parser.error(f"--tokens takes whole numbers, got {args.tokens!r}")
    about, tokens = gpu.about(device, dtype), [int(count) for count in args.tokens.split(",")]
    todo = gpu.parts(shapes, tokens, dtype, device, args.rounds, args.tiles, about["device"], args.workers)
    _in_parts(todo, about, args)


def _in_parts(todo: dict[str, Callable[[], gpu.Rows]], about: dict[str, str], args: argparse.Namespace) -> None:
    done = gpu.run(todo, about, args.out, args.minutes)
    print(gpu.page(about, done, list(todo)))
    print(f"{len(done.keys() & todo.keys())} of {len(todo)} parts in {args.out}")


def _gpu_steps(argv: list[str]) -> None:
    names = sorted(folder.name for folder in plan.MODELS.iterdir())
    parser = argparse.ArgumentParser(prog="benchmarks gpu-steps", description="training steps of big models, timed")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-steps"), help="of results and page; goes on there")
    chosen = "olmoe-1b-7b,deepseek-v2-lite,qwen3-30b-a3b"
    parser.add_argument("--models", default=chosen, help=f"comma-separated, of {', '.join(names)}")
    parser.add_argument("--rounds", type=_rounds, default=5, help="steps that are timed, after two that are not")
    parser.add_argument("--minutes", type=float, default=10.0, help="no new part after so many")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.models.split(",") if name not in names]:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(names)}")
    if not torch.cuda.is_available():
        parser.error("no GPU here: nothing is timed")
    device = torch.device("cuda")
    about = gpu.about(device, torch.bfloat16, esft)
    memory = torch.cuda.get_device_properties(device).total_memory
    paths = [plan.MODELS / name for name in args.models.split(",")]
    todo = gpu_steps.parts(paths, device, args.rounds, memory, about["device"])
    _in_parts(todo, about, args)


def _scale(argv: list[str]) -> None:
    names = sorted(path.name for path in random_checkpoint.MODELS.iterdir())
    parser = argparse.ArgumentParser(prog="benchmarks scale", description="a big model's stages at its true size")
    parser.add_argument("--model", choices=names, default="olmoe-1b-7b")
    parser.add_argument("--frozen", choices=FROZEN, default="auto", help="what frozen experts are kept in")
    parser.add_argument("--experts", type=Path, help="selection file; what scoring chooses where it is left out")
    parser.add_argument("--experts-per-layer", type=int, help="train so many of each layer, in the place of a file")
    parser.add_argument("--frozen-linear", choices=FROZEN_LINEAR, default="bf16", help="and other frozen layers")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--recompute", choices=RECOMPUTES, default="none")
    parser.add_argument("--micro-batch-size", type=int, default=scale.RECORDS, help="records computed together")
    parser.add_argument("--memory-gb", type=float, help="hold every stage to this, in a control group")
    every = f"{', '.join(scale.STAGES)}; and of others {', '.join(scale.PEERS)}"
    parser.add_argument("--stages", default=",".join(scale.STAGES), help=f"comma-separated: {every}")
    parser.add_argument("--folder", type=Path, default=Path("build/scale"), help="of checkpoint, runs and results")
    args = parser.parse_args(argv)
    stages = set(args.stages.split(","))
    if args.experts_per_layer:
        args.folder.mkdir(parents=True, exist_ok=True)
        file = args.folder / f"{args.model}.{args.experts_per_layer}.json"
        args.experts = scale.first_experts(args.model, args.experts_per_layer, file)
    kept = "frozen frozen_linear optimizer recompute micro_batch_size".split()
    settings = {name: str(getattr(args, name)) for name in kept}
    rows = scale.measure(args.model, settings, args.experts, args.folder, args.memory_gb, stages)
    print(table(scale.shown(rows)))
    print(json.dumps({"model": args.model, "memory_gb": args.memory_gb, **settings, "measured": rows}))


COMMANDS = {
    "gpu": _gpu,
    "gpu-steps": _gpu_steps,
    "plan": _plan,
    "scale": _scale,
    "tune": _tune,
    "layer": _layer,
    "step": _step,
    "ranks": _ranks,
    "methods": study.main,
    "routing": routing.main,
    "data": _data,
    "roofline": _roofline,
}


def main(argv: list[str]) -> None:
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("layer", argv)
    if argv in (["-h"], ["--help"]):
        print(__doc__)
    elif name not in COMMANDS:
        sys.exit(f"benchmarks: no {name!r}; there are {', '.join(COMMANDS)}")
    else:
        COMMANDS[name](rest)


if __name__ == "__main__":
    main(sys.argv[1:])
