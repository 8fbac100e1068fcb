"""Commands of several processes beside the same ones by one."""

import argparse
import json
import os
import re
import shutil
import signal
import time
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pytest

import esft
from esft.cli.job import job as of_several
from esft.cli.parser import main
from tests.esft.models import chat, save_tiny, tiny_model, write_records
from tests.esft.parallel.jobs import job

STAGES = {
    "score": "score --model base --data d.jsonl --out s{end}.json --max-length 16 --max-tokens 60 --gradients --quiet",
    "eval": "eval --model base --data d.jsonl --batch-size 3 --out e{end}.json --quiet",
    "choose": "eval --model base --data c.jsonl --metrics choices --out c{end}.json --quiet",
    "generate": "generate --model base --prompt a --prompt bb --prompt ccc --max-new-tokens 4 --quiet",
    "select": "select --scores s{end}.json --out x{end}.json",
}

ENCODING = (
    "score --model base --out s.json",
    "eval --model base",
    "generate --model base --prompt a",
    "train --model base --method full --out run --steps 1 --quiet",
)


def stages(end: str) -> list:
    """Every stage's exit status and what it printed."""
    found = []
    for text in STAGES.values():
        printed = StringIO()
        with redirect_stdout(printed):
            status = main(text.format(end=end).split())
        found.append([status, printed.getvalue()])
    return found


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    write_records(tmp_path / "d.jsonl", 7)
    asked = [{"messages": chat(f"is {i}?", "no"), "choices": ["yes", "no", "may", "be"][: 2 + i % 3]} for i in range(5)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return tmp_path


def test_scores_losses_and_answers_are_those_of_a_single_process_in_their_order(work):
    alone = stages("1")
    first, *others = job(work, 3, partial(stages, "3"))
    assert [e.status for e in (first, *others)] == [0, 0, 0] and first.said == ""
    assert [e.value for e in others] == [[[0, ""]] * len(STAGES)] * 2  # the first one alone says anything
    assert [status for status, _ in alone] == [0] * len(STAGES)
    by_name = dict(zip(STAGES, zip(alone, first.value, strict=True), strict=True))
    for name in ("score", "select"):
        expected, found = by_name[name]
        assert found == [0, expected[1].replace("s1.json", "s3.json").replace("x1.json", "x3.json")]
    assert by_name["generate"][0] == by_name["generate"][1]
    expected, found = (json.loads((work / f"e{n}.json").read_text()) for n in (1, 3))
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert found == expected and len(found["answers"]) == 7
    expected, found = (json.loads((work / f"c{n}.json").read_text()) for n in (1, 3))
    assert found == expected and len(found["answers"]) == 5
    expected, found = (esft.ExpertScores.load(work / f"s{n}.json") for n in (1, 3))
    assert found.token_scores == expected.token_scores
    for layer, scores in found.gate_scores.items():
        assert scores == pytest.approx(expected.gate_scores[layer], rel=1e-6)
    assert expected.fisher_scores
    for name in ("fisher_scores", "fisher_rows_scores"):
        for layer, scores in getattr(expected, name).items():
            assert getattr(found, name)[layer] == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_that_is_not_shared_is_the_first_ones_who_waits_for_nobody(monkeypatch, rank: int):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))  # without an address where the others could be met
    with of_several(argparse.Namespace(stage="chat")) as takes_part:
        assert takes_part == (rank == 0)


def told() -> list:
    args = argparse.Namespace(stage="eval", quiet=False)
    with of_several(args) as takes_part:
        return [takes_part, args.quiet, os.environ["TORCH_CPP_LOG_LEVEL"]]


def test_all_take_part_in_a_stage_that_is_shared_and_all_but_the_first_are_quiet(tmp_path):
    assert [e.value for e in job(tmp_path, 2, told)] == [[True, False, "ERROR"], [True, True, "ERROR"]]


def test_the_first_rank_that_fails_says_so_in_one_line_with_its_name(work):
    ended = job(work, 2, partial(main, "score --model none --data d.jsonl --out s.json".split()))
    assert [e.value if e.status == 0 else e.status for e in ended] == [2, 2]
    said = "".join(e.said for e in ended)
    assert said.count("\n") == 1 and said.startswith(("esft: rank 0: none: ", "esft: rank 1: none: "))


@pytest.mark.parametrize(
    ("command", "others", "unlike"),
    [
        ("eval --model base --data d.jsonl --loss-only", "--limit 3", "option limit than rank 0: 3, not None"),
        ("generate --model base --prompt a", "--prompt b", r"option prompt than rank 0: \['a', 'b'\], not \['a'\]"),
        ("eval --model base", "--data", "e.jsonl than rank 0: "),
        ("score --model base --out s.json", "--data", "e.jsonl than rank 0: "),
        *((command, "template", "tokenizer or chat template than rank 0: ") for command in ENCODING),
        *((command, "weights", "model( or adapter)? than rank 0: ") for command in ENCODING),
    ],
)
def test_a_process_with_other_options_or_other_records_is_found_out(work, command: str, others: str, unlike: str):
    """``--data``, ``template`` and ``weights`` stand for files of one name, whose content differs on the second."""

    def unlike_the_first() -> int:
        second = os.environ["RANK"] == "1"
        if others.startswith("--") and others != "--data":
            return main([*command.split(), *(others.split() if second else ())])
        (place := work / os.environ["RANK"]).mkdir()
        os.chdir(place)
        shutil.copytree(work / "base", "base")
        if second and others == "weights":
            tiny_model(seed=1).save_pretrained("base")
        if second and others == "template":
            Path("base/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        write_records(place / "e.jsonl", 4 if second and others == "--data" else 3)
        return main([*command.split(), *(() if "--prompt" in command else ("--data", "e.jsonl"))])

    ended = job(work, 2, unlike_the_first)
    assert [e.value if e.status == 0 else e.status for e in ended] == [2, 2]
    # Beside bars of loading and saving.
    (line,) = [line for e in ended for line in re.split(r"[\r\n]+", e.said) if line.startswith("esft")]
    assert re.search(rf"^esft: rank \d: rank 1 has other {unlike}", line)


def test_a_signal_to_one_ends_all_and_the_first_says_how_to_go_on(work):
    esft.ExpertSelection({1: [0, 3], 2: [5]}).save(work / "x.json")
    train = "train --model base --data d.jsonl --experts x.json --out run --steps 10000 --batch-size 4 --quiet"

    def then(pids: list[int]) -> None:
        while not (work / "run" / "metrics.jsonl").is_file():
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(pids[1], signal.SIGTERM)

    first, second = job(work, 2, partial(main, train.split()), then)
    assert (first.value, second.value, second.said) == (143, 143, "")
    assert first.said.startswith(f"esft: rank 0: {work / 'run'}: stopped after step ") and first.said.count("\n") == 1
    assert first.said.endswith(f"; go on with: torchrun --nproc-per-node=2 -m esft {train} --resume\n")
    assert [path.name for path in (work / "run" / "checkpoints").iterdir()]


def test_one_process_is_no_job_and_has_no_name(capsys):
    assert main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("esft: nowhere")
