"""Measure the pretrained model and write its model card and loss curve.

    python -m examples.pretrain.card --work DIR --model examples/tiny-moe

Needs the corpus's held-out documents, so it runs where the model was trained.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import esft
from esft.checkpoint.load import load_model, load_tokenizer
from esft.data.batches import windows
from esft.data.encoding import Encoder, encode_all
from esft.data.examples import Example
from esft.data.records import Record
from esft.evaluation.loss import mean_loss
from esft.evaluation.scores import exact_match
from esft.runs.report import table
from examples.pretrain import data
from examples.pretrain.instruction_words import Lexicon
from examples.pretrain.instructions import KINDS, probes

LENGTH = 512
PROBES = 200


def text_examples(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Example]:
    """Every token of a document is a target; documents are cut into rows of LENGTH."""
    examples = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        examples += [Example(ids[i : i + LENGTH], ids[i : i + LENGTH]) for i in range(0, len(ids) - 1, LENGTH)]
    return examples


def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Loss in bits over the bytes of the documents. The first token of a cut row is not predicted: it is left out."""
    examples = text_examples(tokenizer, texts)
    predicted = sum(len(e.ids) - 1 for e in examples)
    unpredicted = sum(len(e.ids) > 0 for e in examples)
    total = sum(len(text.encode()) for text in texts)
    loss = mean_loss(model, examples, tokenizer.pad_token_id, 16)
    # The bytes of unpredicted tokens are taken at the average length of a token.
    return loss * predicted / math.log(2) / (total * predicted / (predicted + unpredicted))


def probe_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lexicon: Lexicon) -> dict[str, float]:
    """Share of exact answers to each sort of probe, on held-out prompts."""
    scores = {}
    for name, pairs in probes(7, tokenizer, lexicon, PROBES).items():
        records = [Record([{"role": "user", "content": p}, {"role": "assistant", "content": a}]) for p, a in pairs]
        scores[name] = exact_match(model, tokenizer, records, batch_size=50)[0]
    return scores


def token_shares(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """[layers, experts], the share of rows of each expert."""
    scores = esft.score_experts(model, windows(examples, LENGTH, 8), max_tokens=32_768)
    return torch.tensor([list(layer.values()) for layer in scores.token_scores.values()])


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over layers of the share of rows that two domains send to the same experts, in [0, 1]."""
    return torch.minimum(one, other).sum(dim=1).mean().item()


def most_used(shares: torch.Tensor, top_p: float) -> float:
    """Mean over layers of how many experts it takes to receive ``top_p`` of the rows."""
    reached = shares.sort(dim=1, descending=True).values.cumsum(dim=1)
    return ((reached < top_p).sum(dim=1) + 1).float().mean().item()


def plot_curve(metrics: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for key, label in (("text", "text"), ("instructions", "instructions (answers)")):
        axes.plot([m["tokens"] / 1e6 for m in metrics], [m[key] for m in metrics], label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the pretrained model and write its card")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = load_tokenizer(str(args.model))
    model = load_model(str(args.model))
    parameters = sum(p.numel() for p in model.parameters())
    esft.swap(model, esft.ExpertSelection({}))
    sources = json.loads((args.work / "text" / "sources.json").read_text())
    metrics = [json.loads(line) for line in (args.work / "run" / "metrics.jsonl").read_text().splitlines()]

    rows, shares = [], {}
    for domain, texts in data.read_texts(args.work, "heldout").items():
        shares[domain] = token_shares(model, text_examples(tokenizer, texts))
        rows.append(
            {
                "domain": domain,
                "train MB": f"{sources[domain]['train']['bytes'] / 1e6:.1f}",
                "held-out kB": f"{sources[domain]['heldout']['bytes'] / 1e3:.0f}",
                "held-out bits per byte": f"{bits_per_byte(model, tokenizer, texts):.3f}",
                "experts for 20% of the rows": f"{most_used(shares[domain], 0.2):.1f}",
                "sources": ", ".join(s["package"] for s in sources[domain]["sources"]),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    chats = data.read_chats(args.work / "instructions.heldout.jsonl")[:600]
    shares["instructions"] = token_shares(
        model, encode_all(Encoder(tokenizer, LENGTH), [Record(chat) for chat in chats], "instructions")
    )
    names = list(shares)
    common = [
        {"": one} | {other: f"{overlap(shares[one], shares[other]):.2f}" for other in names[: names.index(one) + 1]}
        for one in names
    ]
    common = [{key: row.get(key, "") for key in ["", *names]} for row in common]
    mean_share = torch.stack(list(shares.values())).mean(dim=0)
    scored = probe_scores(model, tokenizer, Lexicon.load(args.work / "lexicon"))
    last = metrics[-1]
    plot_curve(metrics, args.model / "loss.png")
    experts = mean_share.shape[1]
    card = f"""# tiny-moe

A small Mixture-of-Experts language model to try fine-tuning on: {parameters / 1e6:.1f}M parameters in the DeepSeek-V2
architecture, {mean_share.shape[0]} MoE layers of {experts} routed experts and one shared, top-4, bf16. It loads with plain
`AutoModelForCausalLM.from_pretrained`. It was trained from scratch on a CPU by `examples/pretrain`, which fetches the corpus, and
it knows what {last["tokens"] / 1e6:.0f} million tokens teach: formats and copying, some language, no facts worth having.

## Training

{last["tokens"]:,} tokens in {last["step"]:,} steps, in two rounds of two stages each: text with a third of instruction rows, then
mostly instructions while the learning rate falls. The first round ended at 20,094,976 tokens, the second goes on from its
optimizer state with the learning rate high again; the kinds of `instruction_quoting.py` joined at 24.8 million. Last training loss: text {last["text"]}, instructions {last["instructions"]} nats per token;
held-out (text, instructions): {next(m["heldout"] for m in reversed(metrics) if "heldout" in m)}.

![training loss](loss.png)

## Corpus and held-out bits per byte

Documents were split off by hash before training. Instructions ({len(KINDS)} kinds, `examples/pretrain/instructions.py`) are generated,
and share nothing with the tasks of `examples/`.

{table(rows)}

## Probes

Exact answers on {PROBES} held-out prompts each: {", ".join(f"{name} {score:.1%}" for name, score in scored.items())}.
`repeat`: say eight random tokens again. `json`: fill one JSON field from a sentence. `request`: a whole JSON object from a sentence.

## Routing

Share of its rows that a domain sends to the same experts as another, mean over layers (1: the same experts in the same
proportions). The busiest expert of a layer gets {mean_share.max():.1%} of all rows, the idlest {mean_share.min():.1%}; an even share
is {1 / experts:.1%}.

{table(common)}
"""
    (args.model / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
