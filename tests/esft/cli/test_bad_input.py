"""Bad input of every kind to every command: one line, status 2, no file changed, and soon."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import esft
from esft.checkpoint.load import load_model
from esft.cli.parser import main
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from tests.esft.checkpoint.files import rewrite, rewrite_json
from tests.esft.models import save_tiny, tiny_model, write_records

SECONDS = 60  # for one command, on a machine that does other work too
SCORES = {"token_scores": {"1": {"0": 0.5, "1": 0.5}}, "gate_scores": {}}
DEEP, LONG = "[" * 50_000, "9" * 5000

SCORE = "score --model base --data d.jsonl --out s2.json"
SELECT = "select --scores s.json --out e2.json"
TRAIN = "train --model base --data d.jsonl --experts e.json --out run2 --steps 1 --batch-size 2"
LORA = "train --model base --data d.jsonl --method lora --out run2 --steps 1 --batch-size 2"
EVAL = "eval --model base --data d.jsonl --loss-only"
GENERATE = "generate --model base --prompt x --max-new-tokens 2"
MERGE = "merge --model base --adapter a --out m2"
REPORT = "report run"
READ_A_MODEL = [SCORE, TRAIN, EVAL, GENERATE, MERGE]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base")
    tiny_model().save_pretrained(folder / "shards", max_shard_size="100KB")
    save_tiny(folder / "no_shared", "qwen3_moe")
    write_records(folder / "d.jsonl", 4)
    (folder / "s.json").write_text(json.dumps(SCORES))
    ExpertSelection({1: [0]}).save(folder / "e.json")
    esft.save_adapter(esft.swap(load_model(str(folder / "base")), ExpertSelection({1: [0]})), folder / "a")
    config = TrainConfig(method="lora", steps=1, batch_size=2, dtype="float32")
    esft.train(str(folder / "base"), folder / "d.jsonl", folder / "run", config, progress=False)
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ESFT_DEBUG", raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on standard input"))

    def late(*_: object) -> None:
        pytest.fail(f"takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def held(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(command: str, capsys: pytest.CaptureFixture[str], work: Path, message: str = "") -> str:
    """The one line of a command that fails and leaves every file as it was."""
    before = held(work)
    capsys.readouterr()
    try:
        status = main(command.split())
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("esft")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in printed.err, printed.err
    assert message in lines[0], lines[0]
    assert "shows where" not in lines[0] and "cannot be used" not in lines[0], lines[
        0
    ]  # checked, and not caught in the net
    assert all(c.isprintable() for c in lines[0]) and held(work) == before
    return lines[0]


def test_what_is_sound_is_accepted(work):
    for command in (SCORE, SELECT, TRAIN, EVAL, GENERATE, MERGE, REPORT):
        assert main([*command.split(), *(["--quiet"] if command in (SCORE, TRAIN, EVAL) else [])]) == 0, command


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda work: (work / name).write_text(text)


def config(**change: object) -> Callable[[Path], object]:
    return lambda work: rewrite_json(work / "base" / "config.json", lambda whole: whole.update(change))


def index(content: object) -> Callable[[Path], object]:
    def damage(work: Path) -> None:
        (work / "base" / "model.safetensors").rename(work / "secret.safetensors")
        (work / "base" / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def pickled(work: Path) -> None:
    torch.save(load_file(work / "base" / "model.safetensors"), work / "base" / "pytorch_model.bin")
    (work / "base" / "model.safetensors").unlink()


def pipe(name: str) -> Callable[[Path], object]:
    def damage(work: Path) -> None:
        (work / name).unlink(missing_ok=True)
        os.mkfifo(work / name)

    return damage


MODELS = {
    "an index above the folder": (index({"weight_map": {"a": "../secret.safetensors"}}), "is not the name of"),
    "an absolute index": (index({"weight_map": {"lm_head.weight": "/secret.safetensors"}}), "is not the name of"),
    "an index that is null": (index(None), "has no weight_map"),
    "an index that is a list": (index([1]), "has no weight_map"),
    "pickles": (pickled, "pickled weights are never loaded"),
    "a billion experts": (config(n_routed_experts=10**9), "at most 65,536"),
    "ten million layers": (config(num_hidden_layers=10**7), "at most 500"),
    "null experts a token": (config(num_experts_per_tok=None), "num_experts_per_tok is None, not a number of the 8"),
    "groups that do not divide": (config(n_group=3), "n_group is 3, which does not divide the 8 experts"),
    "a quantisation of plain weights": (config(quantization_config={"quant_method": "fp8"}), "no tensor is quantized"),
    "a model of another type": (config(architectures=["BertModel"]), "architectures names BertModel, which"),
    "rotary parameters that are none": (config(rope_parameters={"rope_theta": "x"}), "rope_theta is 'x', not a"),
    "a rotary embedding that is none": (config(rope_parameters={"rope_type": "x"}), "rope_type is 'x', which"),
    "tuples for outputs": (config(return_dict=False), "return_dict is False"),
    "generation settings that are none": (put("base/generation_config.json", "{"), "generation_config.json: line 1"),
    "an index without metadata": (index({"weight_map": {"a": "b.safetensors"}}), "has no metadata"),
    "no heads": (config(num_attention_heads=0), "which no model has"),
    "a list for a size": (config(hidden_size=[1]), ""),
    "a text for the layers": (config(num_hidden_layers="many"), ""),
    "an unheard model": (config(model_type="unheard"), "not a model's configuration"),
    "a model type of another kind": (config(model_type=["x"]), "not a model's configuration"),
    "code of its own": (config(model_type="x", auto_map={"AutoConfig": "code.C"}), ""),
    "a deep configuration": (put("base/config.json", DEEP), "nested too deeply"),
    "a long number": (put("base/config.json", f'{{"a": {LONG}}}'), "thousands of digits"),
    "no configuration": (lambda work: (work / "base" / "config.json").unlink(), "no config.json"),
    "cut weights": (lambda work: os.truncate(work / "base" / "model.safetensors", 1000), "not a readable safetensors"),
    "empty weights": (lambda work: os.truncate(work / "base" / "model.safetensors", 0), "not a readable safetensors"),
    "a pipe for weights": (pipe("base/model.safetensors"), "is no regular file"),
    "a pipe for the configuration": (pipe("base/config.json"), "is no regular file"),
}  # fmt: skip


@pytest.mark.parametrize("command", READ_A_MODEL, ids=lambda command: command.split()[0])
@pytest.mark.parametrize("kind", MODELS)
def test_a_bad_model(work, capsys, command: str, kind: str):
    damage, message = MODELS[kind]
    damage(work)
    if "pipe" in kind:
        assert "is no regular file" in one_line_with_a_pipe(command, capsys)
        return
    refused(command, capsys, work, message)


def one_line_with_a_pipe(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """As ``refused``, without reading every file before and after."""
    capsys.readouterr()
    assert main(command.split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esft")]
    return line


PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
TOKENIZERS = {
    "none": (lambda work: [p.unlink() for p in (work / "base").glob("tok*")], "holds no tokenizer"),
    "an empty one": (put("base/tokenizer.json", "{}"), "base/tokenizer.json: cannot load a tokenizer"),
    "one at which compiled code panics": (
        lambda work: rewrite_json(work / "base" / "tokenizer.json", lambda whole: whole.update(normalizer=PANICS)),
        "base/tokenizer.json: has a precompiled_charsmap that is none, on which the tokenizer's code breaks off",
    ),
    "no template": (lambda work: (work / "base" / "chat_template.jinja").unlink(), "no chat template"),
    "an empty template": (put("base/chat_template.jinja", ""), ""),
    "a mark before the template": (put("base/chat_template.jinja", "\ufeff{{ 1 }}"), "begins with a byte order mark"),
    "a template of gigabytes": (put("base/chat_template.jinja", "{{ 'x' * 10**8 }}"), "makes 100,000,000 characters"),
    "a list": (put("base/tokenizer_config.json", "[]"), "tokenizer_config.json: not a mapping"),
    "a template that raises": (put("base/chat_template.jinja", "{{ raise_exception('x') }}"), "cannot render it"),
    "a template that divides": (put("base/chat_template.jinja", "{{ 1 / 0 }}"), "cannot render it"),
    "a template without end": (
        put("base/chat_template.jinja", "{% for i in range(10**12) %}x{% endfor %}"),
        "cannot render",
    ),
    "a template that is none": (put("base/chat_template.jinja", "{% for %}"), "cannot render it"),
}


@pytest.mark.parametrize(
    "command", [SCORE, TRAIN, LORA, EVAL, GENERATE], ids=["score", "train", "lora", "eval", "generate"]
)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_bad_tokenizer(work, capsys, command: str, kind: str):
    damage, message = TOKENIZERS[kind]
    damage(work)
    refused(command, capsys, work, message)


RECORDS = [
    "", "\n\n", "{", "[]", "null", DEEP, LONG, f'{{"messages": {LONG}}}', '{"messages": []}', '{"messages": [NaN]}',
    '{"messages": [{"role": "user", "content": 7}]}', '{"messages": [{"role": "tool", "content": "x"}]}',
    '{"messages": [{"role": "assistant", "content": "x"}]}', '{"messages": 1, "messages": 2}',
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
]  # fmt: skip


@pytest.mark.parametrize("command", [SCORE, TRAIN, EVAL], ids=lambda command: command.split()[0])
@pytest.mark.parametrize("text", RECORDS, ids=range(len(RECORDS)))
def test_bad_records(work, capsys, command: str, text: str):
    (work / "d.jsonl").write_text(text)
    refused(command, capsys, work, "d.jsonl")


def test_data_that_never_ends(work, capsys):
    for path, said in (
        ("/dev/zero", "is no regular file"),
        ("base", "base: cannot be read ("),
        ("/dev/null", "is no regular"),
    ):
        for command in (SCORE, TRAIN, EVAL):
            refused(command.replace("d.jsonl", path), capsys, work, said)


SELECTIONS = [
    "", "{", DEEP, f'{{"experts": {LONG}}}',
    '{"experts": {"1": [0]}, "shared_expert": true}', '{"experts": {"1": [0, 0]}}',
    '{"experts": {"1": [-1]}}', '{"experts": {"1": [8]}}', '{"experts": {"0": [1]}}', '{"experts": {"1": [true]}}',
    '{"experts": {"1": [0], "1": [1]}}', '{"experts": {"1": [NaN]}}', '{"experts": {}}', '{"experts": null}',
]  # fmt: skip


@pytest.mark.parametrize("text", SELECTIONS, ids=range(len(SELECTIONS)))
def test_a_bad_selection(work, capsys, text: str):
    for name, command in (
        ("e.json", TRAIN),
        ("a/expert_cfg.json", MERGE),
        ("a/expert_cfg.json", f"{EVAL} --adapter a"),
    ):
        (work / name).write_text(text)
        if text == '{"experts": {}}' and command != TRAIN:
            continue  # an adapter of nothing: then its tensors belong to nothing selected, which the next one tells
        refused(command, capsys, work)


def test_shared_experts_where_there_are_none(work, capsys):
    (work / "e.json").write_text('{"experts": {"1": [0]}, "shared_experts": true}')
    message = "selection names shared experts; the model has none"
    refused(TRAIN.replace("base", "no_shared"), capsys, work, message)
    layers = {str(layer): {str(e): 0.125 for e in range(8)} for layer in range(3)}
    (work / "s.json").write_text(json.dumps({"token_scores": layers, "gate_scores": {}}))
    refused(f"{SELECT} --model no_shared --shared-experts", capsys, work, message)


SETTINGS = [
    "lr: 1\nlr: 2", "stepz: 1", "steps: 1:30", f"steps: {LONG}",
    "lr: .nan", "a: &a [*a]", DEEP, "- 1", "steps: [1]", "\0",
    "steps: !!python/name:os.system", "seed: 1e400", "batch_size: 0", "micro_batch_size: 99",
    "max_length: 257", "x" * 70_000,
]  # fmt: skip


@pytest.mark.parametrize("text", SETTINGS, ids=range(len(SETTINGS)))
def test_bad_settings(work, capsys, text: str):
    (work / "c.yaml").write_text(text)
    refused(f"{LORA.replace('--batch-size 2', '')} --config c.yaml", capsys, work)


@pytest.mark.parametrize("damage", [
    lambda t: t.update(foreign=torch.ones(1)), lambda t: t.popitem(), lambda t: next(iter(t.values())).fill_(torch.nan),
    lambda t: next(iter(t.values())).fill_(torch.inf), lambda t: t.update({next(iter(t)): torch.ones(1)}),
    lambda t: t.update({next(iter(t)): torch.ones(1, dtype=torch.int8)}),
], ids=["foreign", "missing", "no number", "infinite", "shape", "whole numbers"])  # fmt: skip
def test_a_bad_adapter(work, capsys, damage):
    for folder, name, commands in (
        ("a", "adapter.safetensors", [MERGE, f"{EVAL} --adapter a", f"{GENERATE} --adapter a"]),
        ("run/adapter", "adapter_model.safetensors", [f"{EVAL} --adapter run", f"{GENERATE} --adapter run"]),
    ):
        tensors = load_file(work / folder / name)
        damage(tensors)
        save_file(tensors, work / folder / name, {"format": "pt"})
        for command in commands:
            refused(command, capsys, work)


MANIFESTS = [
    "",
    "[]",
    DEEP,
    LONG,
    '{"format_version": true}',
    '{"format_version": 1}',
    '{"format_version": 1, "base_digest": 5}',
]


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_bad_manifest(work, capsys, text: str):
    for folder, commands in (("a", [MERGE, f"{EVAL} --adapter a"]), ("run/adapter", [f"{GENERATE} --adapter run"])):
        (work / folder / "manifest.json").write_text(text)
        for command in commands:
            refused(command, capsys, work, "manifest.json")


def test_a_lora_adapter_to_merge_says_how(work, capsys):
    refused("merge --model base --adapter run --out m2", capsys, work, "merge_and_unload().save_pretrained(OUT)")


REPORTS = ["{", "[]", DEEP, LONG, '{"step": "x"}', '{"step": 1, "loss": "x", "lr": 1, "tokens_per_second": 1}',
    '{"step": 1, "loss": null, "lr": 1, "tokens_per_second": 1}',
    '{"step": 1, "loss": NaN, "lr": 1, "tokens_per_second": 1}',
    '{"step": 1, "loss": 1, "lr": "x", "tokens_per_second": 1}', '{"step": 1, "eval_loss": {}}']  # fmt: skip


@pytest.mark.parametrize("text", REPORTS, ids=range(len(REPORTS)))
def test_a_bad_run_to_report(work, capsys, text: str):
    (work / "run" / "metrics.jsonl").write_text(text)
    refused(REPORT, capsys, work, "metrics.jsonl: line 1")


ARGUMENTS = {
    "score --model base --data d.jsonl --out no/such/s.json": "no/such/s.json: no/such is not a folder",
    f"{EVAL} --out no/such/o.json": "no/such/o.json: no/such is not a folder",
    "select --scores s.json --out /dev/null --overwrite": "/dev/null: is no ordinary file, and is not overwritten",
    f"{SELECT} --plot /dev/null.png/x.png": "is not a folder",
    "select --scores s.json --out loop": "loop: links that lead nowhere",
    "select --scores s.json --out loop/e.json": "loop/e.json: links that lead nowhere",
    f"{SCORE} --max-length 257": "--max-length 257 is beyond the model's 256 positions",
    f"{TRAIN} --max-length 257": "--max-length 257 is beyond the model's 256 positions",
    f"{EVAL} --max-length 257": "--max-length 257 is beyond the model's 256 positions",
    f"{GENERATE} --max-length 4": "more than --max-length 4",
    f"{GENERATE} --prompt {'x' * 200_000}": "more than --max-length 256",
    f"{TRAIN} --lr -1": "--lr must be in [1e-30, 10]",
    f"{TRAIN} --lr 1e-400": "--lr must be float | None, got '1e-400'",
    f"{TRAIN} --lr 1e300": "--lr must be in [1e-30, 10], got 1e300",
    f"{TRAIN} --weight-decay 1e300": "--weight-decay must be in [0, 1000], got 1e300",
    f"{TRAIN} --clip 1e-300": "--clip must be in [1e-8, inf], got 1e-300",
    f"select --scores s.json --out {'x' * 300}": "File name too long",
    f"merge --model base --adapter a --out {'x' * 300}": "File name too long",
    f"merge --model base --adapter {'x' * 300} --out m2": "File name too long",
    f"{TRAIN.replace('run2', 'd/' * 300)}": "lies more than 256 folders deep",
    f"report {'x' * 300}": "File name too long",
    f"{SELECT} --plot {'x' * 300}.png": "File name too long",
    "select --scores s.json --out e.json": "e.json: exists already (--overwrite replaces it)",
    "merge --model base --adapter a --out run": "run: holds something already (--overwrite replaces it)",
    TRAIN.replace("run2", "run"): "holds something already (--overwrite replaces it, --resume goes on with it)",
    f"{EVAL} --out=": "'': is no path",
    f"{SELECT} --plot=": "--plot: must end in",
    f"{TRAIN} --steps {LONG}": "--steps must be",
    f"{SELECT} --plot x.xyz": "--plot: must end in",
    f"{SELECT} --top-p 7": "--top-p: must be in (0, 1]",
    f"{EVAL} --adapter nowhere": "nowhere: not an adapter folder",
    "eval --model ./nowhere --data d.jsonl": "./nowhere: no such folder",
    "eval --model no/such/folder --data d.jsonl": "no/such/folder: no such folder",
    "eval --model d.jsonl --data d.jsonl": "d.jsonl: is a file, not a checkpoint folder",
    "eval --model run/adapter --data d.jsonl": "holds a PEFT adapter, not a model",
    "eval --model a\x1b[31m/b/c --data d.jsonl": "a\\x1b[31m/b/c: no such folder",
    "score --model base --data d\x07 --out o.json": "d\\x07: No such file",
    f"{SCORE} --bogus\x1b": "--bogus\\x1b",
    "report nowhere": "nowhere: not a run folder",
}


@pytest.mark.parametrize("command", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_bad_arguments(work, capsys, command: str):
    if "loop" in command:
        (work / "loop").symlink_to(work / "loop")
    refused(command, capsys, work, ARGUMENTS[command])


def test_weights_that_are_no_numbers_give_no_json_and_no_answer(work, capsys):
    rewrite(work / "base", lambda tensors: tensors["lm_head.weight"].fill_(torch.nan))
    refused(EVAL, capsys, work, "base: loss on d.jsonl is nan")
    refused(GENERATE, capsys, work, "the model's logits are no numbers")


def test_routers_that_decide_by_no_number_give_no_scores(work, capsys):
    rewrite(work / "base", lambda tensors: tensors["model.embed_tokens.weight"].fill_(torch.nan))
    refused(SCORE, capsys, work, "layer 1: its router decides by what is no number")


def test_an_adapter_of_absurd_values_gives_no_answer(work, capsys):
    tensors = load_file(work / "run" / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()},
        work / "run" / "adapter" / "adapter_model.safetensors",
    )
    refused(f"{GENERATE} --adapter run", capsys, work, "the model's logits are no numbers")
    refused(f"{EVAL} --adapter run", capsys, work, "base with run/adapter: loss on d.jsonl is nan")


@pytest.mark.parametrize("command", [SCORE, TRAIN, EVAL], ids=lambda command: command.split()[0])
def test_a_record_over_several_lines_is_no_jsonl(work, capsys, command: str):
    record = json.loads((work / "d.jsonl").read_text().splitlines()[0])
    (work / "d.jsonl").write_text(json.dumps(record, indent=1))
    refused(command, capsys, work, "d.jsonl: one JSON value over several lines; a record is a line of its own")


def test_a_picture_leaves_a_users_file_of_a_likely_name(work):
    (work / ".p.png.tmp").write_text("mine")
    assert main([*SELECT.split(), "--plot", "p.png"]) == 0
    assert (work / ".p.png.tmp").read_text() == "mine" and (work / "p.png").stat().st_size
