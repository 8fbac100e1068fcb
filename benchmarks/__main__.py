"""Check, then time, one MoE layer on the device at hand.

    python -m benchmarks [--device cpu|cuda] [--shapes tiny,deepseek-v2-lite] [--tokens 2048]

Prints a table for people and one JSON line for machines.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.layer import run
from benchmarks.shapes import SHAPES
from esft.report import table


def main() -> None:
    parser = argparse.ArgumentParser(description="check, then time, one MoE layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default="tiny", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if unknown := [name for name in args.shapes.split(",") if name not in SHAPES]:
        parser.error(f"no shape {unknown[0]!r}; there are {', '.join(SHAPES)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: nothing is timed")
    rows = [
        run(SHAPES[name], args.tokens, getattr(torch, args.dtype), device, args.backend, args.rounds)
        for name in args.shapes.split(",")
    ]
    print(table(rows))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "dtype": args.dtype, "measured": rows}))


if __name__ == "__main__":
    main()
