import argparse

import pytest

from esft.cli import arguments as module
from esft.cli.arguments import Parser, budget, count, factor, first_layer, gigabytes, picture, resuming, share


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("17", 17), ("100000", 100_000)])
def test_a_count_is_a_whole_number_from_one_on(text: str, value: int):
    assert count(text) == value


@pytest.mark.parametrize("text", ["0", "-3"])
def test_a_count_below_one_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^must be at least 1, got {text}$"):
        count(text)


@pytest.mark.parametrize("text", ["many", "1.5", ""])
def test_a_count_that_is_no_whole_number_is_refused(text: str):
    with pytest.raises(ValueError):
        count(text)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rows", "0"], "tool: argument --rows: must be at least 1, got 0"),
        (["--rows", "x"], "tool: argument --rows: invalid whole number value: 'x'"),
        (["--columns", "2"], "tool: unrecognized arguments: --columns 2"),
    ],
)
def test_a_complaint_is_one_line_on_stderr_and_the_status_is_2(capsys, arguments: list[str], complaint: str):
    parser = Parser(prog="tool")
    parser.add_argument("--rows", type=count)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == complaint + "\n" and printed.out == ""


def test_good_arguments_are_parsed():
    parser = Parser(prog="tool")
    parser.add_argument("--rows", type=count)
    assert parser.parse_args(["--rows", "4"]).rows == 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("train --out run", "train --out run --resume"),
        ("train --out run --resume", "train --out run --resume"),
        ("train --res --out run", "train --res --out run"),
        ("train --overwrite --out run --quiet", "train --out run --quiet --resume"),
        ("train --ov --out overwrite --recompute none", "train --out overwrite --recompute none --resume"),
        ("train --data - --out run", "train --data - --out run --resume"),
    ],
)
def test_the_command_that_goes_on_is_the_one_that_was_given_and_resumes(monkeypatch, given: str, expected: str):
    monkeypatch.setattr(module.sys, "argv", ["/bin/esft"])
    assert resuming(given.split()) == f"esft {expected}"
    monkeypatch.setattr(module.sys, "argv", ["/lib/esft/__main__.py"])
    assert resuming(given.split()) == f"{module.sys.executable} -m esft {expected}"
    assert resuming(["train", "--out", "a run"]).endswith(" train --out 'a run' --resume")


def test_of_several_processes_those_of_this_machine_are_started_again(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resuming(["train", "--out", "run"]) == "torchrun --nproc-per-node=2 -m esft train --out run --resume"


def test_a_share_is_above_zero_and_at_most_one():
    assert [share(text) for text in ("1", "0.2", "1e-9")] == [1.0, 0.2, 1e-9]
    for text in ("0", "-0.1", "1.01", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"^must be in \(0, 1\], got {text}$"):
            share(text)


def test_gigabytes_are_a_plain_number_above_zero():
    assert [gigabytes(text) for text in ("24", "0.5", "999999999.000000001")] == [24.0, 0.5, 999_999_999.000_000_001]
    for text in ("0", "0.0", "000.000000000"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^must be above 0, got {text}$"):
            gigabytes(text)
    for text in ("1e3", "-1", ".5", "5.", "nan", " 24", "24\n", "1_000", "\u0661", "9" * 10, "0.0000000001"):
        with pytest.raises(ValueError):
            gigabytes(text)


def test_a_picture_has_a_format_that_can_be_drawn():
    assert [picture(name) for name in ("a.png", "b.PDF", "c/d.svg")] == ["a.png", "b.PDF", "c/d.svg"]
    for name in ("a.xyz", "png", "a.png/", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=r"^must end in \.png, \.pdf or \.svg, got "):
            picture(name)


def test_a_count_that_no_machine_word_holds_is_refused_in_short():
    with pytest.raises(argparse.ArgumentTypeError, match=r"^must be at least 1 and below 2\*\*63, got 9{40}$"):
        count("9" * 400)
    with pytest.raises(argparse.ArgumentTypeError, match=f"got {2**63}$"):
        count(str(2**63))
    assert count(str(2**63 - 1)) == 2**63 - 1


@pytest.mark.parametrize("text", ["\u0661\u0662\u0663", "1_000", "0_1", " 7 ", "1e3", "0x10", ""])
def test_only_plain_digits_are_a_count_or_a_share(text: str):
    with pytest.raises(ValueError):
        count(text)
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        share(text)


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("24", 24), ("15%", 0.15), ("2.5%", 0.025), ("100%", 1.0)])
def test_a_budget_is_a_number_or_a_share(text: str, value: float):
    found = budget(text)
    assert found == pytest.approx(value) and type(found) is type(value)


@pytest.mark.parametrize("text", ["0%", "101%"])
def test_a_budget_beyond_all_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^must be above 0% and at most 100%, got {text}$"):
        budget(text)


@pytest.mark.parametrize("text", ["0.5", "%", "-3%", "nan%", "1e2%", "many"])
def test_a_budget_that_is_neither_is_refused(text: str):
    with pytest.raises(ValueError):
        budget(text)


def test_a_factor_is_a_number_from_nothing_on():
    assert (factor("0"), factor("1.25")) == (0, 1.25)
    for text in ("-1", "nan", "inf", ""):
        with pytest.raises(ValueError):
            factor(text)


def test_layers_from_one_on_are_its_number_and_a_colon():
    assert (first_layer("0:"), first_layer("12:")) == (0, 12)
    for text in ("12", ":12", "-1:", "a:", "12:14", "12345:"):
        with pytest.raises(argparse.ArgumentTypeError, match="^must be the first layer's number and a colon, as 12:, "):
            first_layer(text)
