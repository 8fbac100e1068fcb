"""Synthetic instruction records: JSON kinds, record assembly, train/held-out split, probes, the command."""

from __future__ import annotations

import argparse
import csv
import io
import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

from examples.pretrain import instruction_knowledge as _knowledge  # noqa: F401  registers its kinds
from examples.pretrain import instruction_quoting as _quoting  # noqa: F401  registers its kinds
from examples.pretrain.instruction_domains import DOMAINS, FIELDS, Domain, Request, request
from examples.pretrain.instruction_kinds import KINDS, WEIGHTS, kind, mixed
from examples.pretrain.instruction_words import Lexicon, capital, encode, pick, printable_tokens, word

__all__ = ["KINDS", "WEIGHTS", "Lexicon", "probe_json", "probe_repeat", "probes", "record"]

HELDOUT_PERCENT = 2
LABEL_KEYS = ("intent", "intent", "action", "type", "event", "command", "label", "kind")


def dumps(value: object) -> str:
    """JSON as the records write it."""
    return json.dumps(value, ensure_ascii=False)


def styled(label: str, key: str) -> str:
    """The label as written under a key: CamelCase for intent and event, words for kind, snake_case otherwise."""
    parts = label.split("_")
    if key in ("intent", "event"):
        return "".join(capital(p) for p in parts)
    return " ".join(parts) if key == "kind" else label


def labelled(q: Request, key: str) -> dict[str, Any]:
    """{"intent": ..., slots}."""
    return {key: styled(q.action.label, key), **q.values}


def options(rng: Random, domain: Domain, label: str, key: str) -> str:
    """The right label among others of the domain, shuffled."""
    others = [a.label for a in domain.actions if a.label != label]
    names = [label, *rng.sample(others, min(len(others), rng.randint(1, 6)))]
    rng.shuffle(names)
    return ", ".join(styled(n, key) for n in names)


@kind(
    14,
    "{d}: [give the] JSON with {k}",
    "turn the {d} (text|request) into JSON with {k}",
    "(parse|read) as JSON, {k} first ({d})",
    "JSON ({k} and details) for this {d} text",
    "extract {k} and (slots|values) as JSON",
    "{d} (text|command) to JSON ({k})",
    "what is the {k}? Answer in JSON with all details",
)
def json_request(rng, lex):
    q, key = request(rng, lex), pick(rng, LABEL_KEYS)
    return {"d": q.domain.name, "k": key}, q.text, dumps(labelled(q, key))


@kind(
    6,
    "choose {k} from {o} and give JSON",
    "JSON with {k} ({o})",
    "{k} is one of {o}. (Answer in|Give) JSON",
    "possible {k}: {o}. JSON with keys {f}",
    "pick the {k} ({o}) and extract {f} as JSON",
)
def json_listed(rng, lex):
    q, key = request(rng, lex), pick(rng, LABEL_KEYS)
    keys = rng.sample(list(q.values), len(q.values))
    return (
        {"k": key, "o": options(rng, q.domain, q.action.label, key), "f": ", ".join([key, *keys])},
        q.text,
        dumps(labelled(q, key)),
    )


@kind(
    5,
    "{f} as JSON",
    "extract {f} as JSON",
    "JSON with (the keys|fields) {f}",
    "fill (a JSON object|JSON) with {f}",
    "give {f} in JSON, null (if|where) missing",
    "find {f}; write JSON",
)
def json_fields(rng, lex):
    q = request(rng, lex)
    keys = rng.sample(list(q.values), rng.randint(1, len(q.values)))
    if rng.random() < 0.2 and (rest := [k for k in q.domain.keys if k not in q.values]):
        keys.insert(rng.randint(0, len(keys)), pick(rng, rest))
    return {"f": ", ".join(keys)}, q.text, dumps({k: q.values.get(k) for k in keys})


@kind(
    5,
    "give the {f} as JSON",
    "JSON with the key {f}",
    "fill the JSON field {f} from the sentence",
    "extract {f} as JSON",
    "complete the JSON object with key {f}",
    "{f} in JSON",
)
def json_one_field(rng, lex):
    q = request(rng, lex)
    key = pick(rng, list(q.values))
    return {"f": key}, q.text, dumps({key: q.values[key]})


@kind(
    3,
    "what is the {f}",
    "copy the {f} from the (text|sentence)",
    "{f} only",
    "quote the words for {f}",
    "find the {f} [as written]",
    "extract the {f}",
)
def field_text(rng, lex):
    q = request(rng, lex)
    key = pick(rng, list(q.surfaces))
    return {"f": key}, q.text, q.surfaces[key]


@kind(
    4,
    "what {k} is this: {o}",
    "classify the {k} ({o})",
    "choose one {k} of {o}",
    "which {k} fits, {o}",
    "{k}? Options: {o}",
)
def label_only(rng, lex):
    q, key = request(rng, lex), pick(rng, LABEL_KEYS)
    return {"k": key, "o": options(rng, q.domain, q.action.label, key)}, q.text, styled(q.action.label, key)


@kind(
    1.5,
    "what is this text about: {o}",
    "(choose|pick) the domain: {o}",
    "domain ({o})",
    "which area fits: {o}",
    "is this {o}",
)
def text_domain(rng, lex):
    q = request(rng, lex)
    names = [q.domain.name, *rng.sample([d.name for d in DOMAINS if d is not q.domain], rng.randint(1, 4))]
    rng.shuffle(names)
    return {"o": ", ".join(names)}, q.text, q.domain.name


@kind(
    4,
    "repeat the text, then give JSON with {k}",
    "first copy, then write JSON ({k})",
    "copy the sentence; on the next line JSON with {k}",
    "text and JSON with {k}",
    "quote it and parse it ({k})",
)
def copy_then_json(rng, lex):
    q, key = request(rng, lex), pick(rng, LABEL_KEYS)
    return {"k": key}, q.text, f"{q.text}\n{dumps(labelled(q, key))}"


@kind(
    4,
    "parse the last line like the others",
    "(same format|continue)",
    "follow the examples",
    "text to JSON as shown",
    "complete the last JSON",
)
def json_few_shot(rng, lex):
    domain, key = pick(rng, DOMAINS), pick(rng, LABEL_KEYS)
    asked = [request(rng, lex, domain) for _ in range(rng.randint(2, 4))]
    arrow = pick(rng, [" -> ", "\nJSON: ", " => "])
    shown = [f"{q.text}{arrow}{dumps(labelled(q, key))}" for q in asked[:-1]]
    return {}, "\n".join([*shown, asked[-1].text + arrow.rstrip()]), dumps(labelled(asked[-1], key))


@kind(
    2,
    "JSON list of both requests with {k}",
    "two requests; give a JSON list ({k})",
    "parse each line to JSON with {k}",
    "list of JSON objects, {k} first",
    "turn both lines into JSON with {k}",
)
def json_two(rng, lex):
    domain, key = pick(rng, DOMAINS), pick(rng, LABEL_KEYS)
    asked = [request(rng, lex, domain) for _ in range(2)]
    return {"k": key}, "\n".join(q.text for q in asked), dumps([labelled(q, key) for q in asked])


@kind(
    6,
    "rules: {r}. Give JSON with {k} and {f}",
    "use these rules: {r}. JSON keys {k}, {f}",
    "{r}. Parse to JSON with {k} and {f}",
    "apply: {r}. Answer as JSON ({k}, {f})",
    "by the rules {r}, write JSON with {k}, {f}",
)
def json_rules(rng, lex):
    n = rng.randint(2, 4)
    verbs, labels = (
        mixed(rng, lex, n, n),
        [styled("_".join(word(rng, lex) for _ in range(rng.randint(1, 2))), pick(rng, LABEL_KEYS)) for _ in range(n)],
    )
    key, i, form = (
        pick(rng, LABEL_KEYS),
        int(rng.random() * n),
        pick(rng, ["{v} means {n}", '"{v}" -> {n}', "{v} = {n}", "{v}: {n}"]),
    )
    names, parts, values = [], [], {}
    for name, join in rng.sample(
        [
            ("who", "for"),
            ("place", "in"),
            ("count", "times"),
            ("tool", "using"),
            ("target", "the"),
            ("when", "on"),
            ("color", "painted"),
        ],
        rng.randint(1, 3),
    ):
        gens = {
            "who": "person",
            "place": "city",
            "count": "qty",
            "tool": "item",
            "target": "item",
            "when": "day",
            "color": "color",
        }
        surface, value = FIELDS[gens[name]](rng, lex)
        names.append(name)
        parts.append(f"{join} {surface}")
        values[name] = value
    rules = ", ".join(form.format(v=v, n=label) for v, label in zip(verbs, labels, strict=True))
    return (
        {"r": rules, "k": key, "f": ", ".join(names)},
        " ".join([verbs[i], *parts]),
        dumps({key: labels[i], **values}),
    )


def fields(rng: Random, lex: Lexicon, low: int = 1, high: int = 5) -> dict[str, Any]:
    """A flat record of known or made-up keys."""
    out: dict[str, Any] = {}
    for _ in range(rng.randint(low, high)):
        if rng.random() < 0.5:
            name = pick(rng, list(FIELDS))
            out[name] = FIELDS[name](rng, lex)[1]
        else:
            out[word(rng, lex)] = pick(rng, mixed(rng, lex, 1, 1))
    return out


@kind(
    4,
    "[write|turn into|convert to] JSON",
    "as JSON",
    "make a JSON object",
    "key-value text to JSON",
    "put (this|the pairs) in JSON",
)
def pairs_to_json(rng, lex):
    data = {k: str(v) for k, v in fields(rng, lex).items()}
    eq, sep = pick(rng, [": ", "=", " is ", " = ", " - "]), pick(rng, [", ", "\n", "; ", " and "])
    return {}, sep.join(f"{k}{eq}{v}" for k, v in data.items()), dumps(data)


@kind(
    2,
    "write the JSON as (lines|key: value lines)",
    "JSON to lines",
    "list the (pairs|keys and values), one a line",
    "unpack the JSON",
    "show each key and value on its own line",
)
def json_to_lines(rng, lex):
    data = fields(rng, lex)
    return {}, dumps(data), "\n".join(f"{k}: {v}" for k, v in data.items())


@kind(
    2,
    "write [the JSON as] a sentence",
    "JSON to (text|a sentence)",
    "say it in a sentence",
    "put the JSON in words",
    "describe the JSON in one sentence",
)
def json_to_sentence(rng, lex):
    data = fields(rng, lex, 1, 4)
    parts = [f"the {k} is {v}" for k, v in data.items()]
    return {}, dumps(data), capital(" and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)) + "."


@kind(3, "what is {k} in the JSON", "value of {k}", "get {k}", "look up {k}", "give the value (under|for) the key {k}")
def json_lookup(rng, lex):
    data = fields(rng, lex, 2, 6)
    key = pick(rng, list(data))
    return {"k": key}, dumps(data), str(data[key])


@kind(
    2, "set {k} to {v}", "change {k} to {v} in the JSON", "JSON with {k} = {v}", "update {k}: {v}", "put {v} under {k}"
)
def json_set(rng, lex):
    data = fields(rng, lex, 1, 4)
    key, value = (pick(rng, list(data)) if rng.random() < 0.6 else word(rng, lex)), word(rng, lex)
    return {"k": key, "v": value}, dumps(data), dumps({**data, key: value})


@kind(
    1.5, "which keys are in the JSON", "list the keys", "keys only", "name all keys", "give the keys, comma separated"
)
def json_keys(rng, lex):
    data = fields(rng, lex)
    return {}, dumps(data), ", ".join(data)


def _table(rng: Random, lex: Lexicon) -> tuple[str, list[dict[str, Any]]]:
    keys = list(fields(rng, lex, 2, 3))
    rows = [
        {k: str(FIELDS[k](rng, lex)[1] if k in FIELDS else word(rng, lex)) for k in keys}
        for _ in range(rng.randint(1, 3))
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().strip(), rows


@kind(
    2,
    "convert [the CSV] to JSON",
    "CSV to JSON",
    "turn the (table|CSV) into a JSON list",
    "rows as JSON objects",
    "write the CSV as JSON",
)
def csv_to_json(rng, lex):
    text, rows = _table(rng, lex)
    return {}, text, dumps(rows)


@kind(
    2,
    "convert [the JSON] to CSV",
    "JSON to CSV",
    "turn the JSON list into CSV",
    "write as CSV with a header",
    "make a CSV of this",
)
def json_to_csv(rng, lex):
    text, rows = _table(rng, lex)
    return {}, dumps(rows), text


@kind(
    2,
    "JSON list",
    "[write|give] (the items|these) as a JSON list",
    "make a JSON array",
    "items to JSON array",
    "put (these|the items) in a JSON list",
)
def list_to_json(rng, lex):
    items = mixed(rng, lex, 1, 7)
    return {}, pick(rng, [", ", "\n", "; "]).join(items), dumps(items)


JSON_KINDS = frozenset(
    "json_request json_listed json_fields json_one_field json_few_shot json_two json_rules pairs_to_json "
    "json_set csv_to_json list_to_json".split()
)
_NAMES = list(KINDS)
_CUMULATIVE: list[float] = []
for _name in _NAMES:
    _CUMULATIVE.append(WEIGHTS[_name] + (_CUMULATIVE[-1] if _CUMULATIVE else 0.0))


def split_of(kind_name: str, prompt: str) -> str:
    """The split a prompt belongs to, by a stable hash."""
    return "heldout" if zlib.crc32(f"{kind_name}\0{prompt}".encode()) % 100 < HELDOUT_PERCENT else "train"


def exchange(rng: Random, lexicon: Lexicon, kind_name: str | None = None, split: str = "train") -> tuple[str, str, str]:
    """(kind, prompt, answer) within the split and within a length that fits a training sequence."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be train or heldout, not {split!r}")
    name = kind_name or rng.choices(_NAMES, cum_weights=_CUMULATIVE)[0]
    for _ in range(20_000):
        prompt, answer = KINDS[name](rng, lexicon)
        if split_of(name, prompt) == split and prompt and answer and len(prompt) <= 900 and len(answer) <= 400:
            return name, prompt, answer
    raise RuntimeError(f"kind {name} has no prompt in split {split}")


def record(rng: Random, lexicon: Lexicon, kind: str | None = None, split: str = "train") -> dict[str, Any]:
    """One chat record; without a `kind`, 15% have two or three independent exchanges."""
    turns = 1 if kind or rng.random() >= 0.15 else rng.randint(2, 3)
    messages, names = [], []
    for _ in range(turns):
        name, prompt, answer = exchange(rng, lexicon, kind, split)
        names.append(name)
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": "+".join(names)}


def probe_repeat(rng: Random, tokenizer: Any, n: int = 8, pieces: list[str] | None = None) -> tuple[str, str]:
    """(prompt, answer): repeat `n` random tokens whose joined text encodes back to the same tokens."""
    pieces = pieces or printable_tokens(tokenizer)
    while True:
        chosen = rng.sample(pieces, n)
        if encode(tokenizer, "".join(" " + p for p in chosen)) == [encode(tokenizer, " " + p)[0] for p in chosen]:
            text = " ".join(chosen)
            return f"Repeat: {text}", text


def probe_json(rng: Random, lexicon: Lexicon) -> tuple[str, str]:
    """(prompt, answer): fill one JSON field from a sentence, a held-out prompt."""
    return exchange(rng, lexicon, "json_one_field", "heldout")[1:]


def probes(seed: int, tokenizer: Any, lexicon: Lexicon, count: int) -> dict[str, list[tuple[str, str]]]:
    """`count` probes of each sort."""
    rng, pieces = Random(seed), printable_tokens(tokenizer)
    return {
        "repeat": [probe_repeat(rng, tokenizer, pieces=pieces) for _ in range(count)],
        "json": [probe_json(rng, lexicon) for _ in range(count)],
        "request": [exchange(rng, lexicon, "json_request", "heldout")[1:] for _ in range(count)],
    }


def write(path: Path, rng: Random, lexicon: Lexicon, count: int, split: str) -> None:
    """Write `count` records as JSON lines, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as f:
        for _ in range(count):
            f.write(json.dumps(record(rng, lexicon, split=split), ensure_ascii=False) + "\n")
    part.replace(path)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write synthetic instruction records.")
    parser.add_argument("--work", type=Path, required=True, help="folder with lexicon/; the records go there")
    parser.add_argument("--count", type=int, default=100_000, help="training records; a fiftieth of it is held out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json whose tokens the copy kinds use")
    args = parser.parse_args(argv)
    tokens = None
    if args.tokenizer:
        from tokenizers import Tokenizer

        tokens = printable_tokens(Tokenizer.from_file(str(args.tokenizer)))
    lexicon = Lexicon.load(args.work, tokens)
    args.work.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.count), ("heldout", args.count // 50)):
        path = args.work / f"instructions.{split}.jsonl"
        write(path, Random(f"{args.seed}-{split}"), lexicon, count, split)
        print(f"{path}: {count} records")


if __name__ == "__main__":
    main()
