"""What ``esft select`` hands to the Python calls that it covers, and what it prints and writes."""

from types import SimpleNamespace

import pytest

import esft
from esft.cli.parser import main
from esft.cli.stages import select
from esft.selection import ExpertSelection
from tests.esft.cli.conftest import NO_COUNTS, put, refused, stage, usage, values


@pytest.fixture
def scored(work):
    token = {1: {0: 0.6, 1: 0.4}, 2: {0: 0.1, 1: 0.9}}
    gate = {1: {0: 0.2, 1: 0.8}, 2: {0: 0.7, 1: 0.3}}
    esft.ExpertScores(token, gate).save(work / "s.json")
    esft.ExpertScores({1: {0: 1.0, 1: 0.0}, 2: {0: 0.0, 1: 1.0}}, {}).save(work / "general.json")
    ExpertSelection({1: [1], 2: [1, 0]}, shared_experts=True).save(work / "like.json")
    ExpertSelection({1: [1], 2: [0]}, non_expert_modules=True).save(work / "others.json")
    return work


@pytest.mark.parametrize(
    ("more", "experts", "flags"),
    [
        ("", {1: [0], 2: [1]}, (False, False)),
        ("--by gate", {1: [1], 2: [0]}, (False, False)),
        ("--top-p 0.7 --shared-experts", {1: [0, 1], 2: [1]}, (True, False)),
        ("--non-expert-modules", {1: [0], 2: [1]}, (False, True)),
        ("--experts-per-layer 2", {1: [0, 1], 2: [1, 0]}, (False, False)),
        ("--budget 1", {1: [], 2: [1]}, (False, False)),
        ("--budget 75%", {1: [0, 1], 2: [1]}, (False, False)),
        ("--by gate --budget 3", {1: [1], 2: [0, 1]}, (False, False)),
        ("--layers 2:", {2: [1]}, (False, False)),
        ("--like like.json", {1: [0], 2: [1, 0]}, (True, False)),
        ("--like others.json", {1: [0], 2: [1]}, (False, True)),
        ("--against general.json --experts-per-layer 1", {1: [1], 2: [0]}, (False, False)),
        ("--against general.json --experts-per-layer 1 --weight 0", {1: [0], 2: [1]}, (False, False)),
    ],
)
def test_select_writes_and_prints_the_choice(scored, capsys, more: str, experts: dict, flags: tuple):
    stage(f"select --scores s.json --out e.json {more}")
    chosen = ExpertSelection.load("e.json")
    assert (chosen.experts, (chosen.shared_experts, chosen.non_expert_modules)) == (experts, flags)
    count = sum(map(len, experts.values()))
    lines = [f"layer {layer}: {ids}" for layer, ids in experts.items()]
    assert capsys.readouterr().out.splitlines() == [*lines, f"{count} of 4 experts in e.json"]
    assert main(f"select --scores s.json --out e.json {more}".split()) == 2
    assert "e.json: exists already" in capsys.readouterr().err
    stage(f"select --scores s.json --out e.json --overwrite {more}")


def test_select_draws_what_it_chose_by_and_keeps_a_picture_that_is_there(scored, calls, capsys):
    calls.watch("plot_scores", None)
    stage("select --scores s.json --out e.json --by gate --plot p.png")
    ((arguments, named),) = calls.of["plot_scores"]
    assert arguments == (esft.ExpertScores.load("s.json"), ExpertSelection.load("e.json"), "p.png")
    assert named == {"by": "gate"}
    (scored / "p.png").write_text("")
    assert main("select --scores s.json --out new.json --plot p.png".split()) == 2
    assert "p.png: exists already" in capsys.readouterr().err and not (scored / "new.json").exists()
    stage("select --scores s.json --out new.json --plot p.png --overwrite")


def test_select_holds_the_scores_to_the_model(scored, calls, monkeypatch, capsys):
    put(monkeypatch, "moe_layers", lambda model: [SimpleNamespace(index=1, num_experts=2)])
    assert main("select --scores s.json --out e.json --model m".split()) == 2
    assert "another model" in capsys.readouterr().err
    two = [SimpleNamespace(index=index, num_experts=2, shared_experts=[]) for index in (1, 2)]
    put(monkeypatch, "moe_layers", lambda model: two)
    assert main("select --scores s.json --out e.json --model m --shared-experts".split()) == 2
    assert "selection names shared experts; the model has none" in capsys.readouterr().err
    stage("select --scores s.json --out e.json --model m --trust-remote-code")
    assert calls.of["load_skeleton"][-1] == (("m", True), {})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--weight 2", "--weight goes with --against"),
        ("--layers 1: --shared-experts", "--layers and --shared-experts do not go together: these train in all layers"),
        ("--layers 1: --non-expert-modules", "--layers and --non-expert-modules do not go together"),
        ("--layers 3:", "no layer from 3 on has scores; the last one is layer 2"),
        ("--budget 5", "a budget of 5 experts: the layers have 4"),
        ("--by output", "there are no output scores to select by"),
        ("--like absent.json", "absent.json: No such file"),
        ("--against like.json", "like.json: not a score file"),
        ("--layers 2: --like like.json", "layer 1 is to have 1 experts, and has no scores to choose them by"),
    ],
)
def test_a_choice_that_cannot_be_made_is_one_line(scored, capsys, more: str, message: str):
    assert main(f"select --scores s.json --out e.json {more}".split()) == 2
    assert message in capsys.readouterr().err and not (scored / "e.json").exists()


def test_how_many_is_said_once(scored, capsys):
    with pytest.raises(SystemExit, match="2"):
        main("select --scores s.json --out e.json --budget 2 --top-p 0.3".split())
    assert "not allowed with argument" in capsys.readouterr().err


def test_select_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, select) == (
        "--scores SCORES [--by {token,gate,output,fisher,fisher_rows}] "
        "[--top-p TOP_P | --experts-per-layer N | --budget N | --like FILE] [--against SCORES] [--weight L] "
        "[--layers FROM:] --out OUT [--model MODEL] [--shared-experts] [--non-expert-modules] [--plot PNG] "
        "[--overwrite] [--trust-remote-code]"
    )
    assert values(monkeypatch, "select --scores s --out o") == {
        "scores": "s", "by": "token", "top_p": 0.2, "out": "o", "model": None, "shared_experts": False,
        "non_expert_modules": False, "plot": None, "overwrite": False, "experts_per_layer": None,
        "budget": None, "like": None, "against": None, "weight": None, "layers": 0, "trust_remote_code": False,
    }  # fmt: skip


@pytest.mark.parametrize("value", NO_COUNTS[1:])
@pytest.mark.parametrize("option", ["--top-p", "--experts-per-layer", "--budget", "--weight", "--layers"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, option: str, value: str):
    assert f"argument {option}: " in refused(capsys, f"select --scores s --out o {option} {value}")
