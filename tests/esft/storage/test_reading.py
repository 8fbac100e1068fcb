import os
import re
import sys
import time
from pathlib import Path

import pytest

import esft
from esft.errors import InputError
from esft.storage.files import write_json
from esft.storage.reading import (
    check_keys,
    check_name,
    check_regular,
    key_number,
    parse_json,
    read_json,
    read_settings,
    read_text,
    shown,
    texts_below,
)


def test_text_is_read_in_its_encoding_and_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x").write_bytes("\ufeffÄ".encode())
    assert read_text(tmp_path / "x") == "\ufeffÄ"
    assert read_text(str(tmp_path / "x"), "utf-8-sig") == "Ä"
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    for read in (read_text, read_json):
        with pytest.raises(esft.InputError, match=r"/x: not UTF-8 text$"):
            read(tmp_path / "x")
        with pytest.raises(esft.InputError, match=r"/absent: No such file or directory$"):
            read(tmp_path / "absent")


def test_json_is_read_as_it_was_written_and_where_it_is_none_the_line_is_named(tmp_path):
    value = {"a": [1, 2.5, None, True], "ä": {"b": "c"}}
    write_json(str(tmp_path / "x.json"), value)
    assert read_json(str(tmp_path / "x.json")) == value
    (tmp_path / "x.json").write_text('{"a": 1,\n"b": }')
    with pytest.raises(esft.InputError, match=r"/x\.json: line 2: not JSON \(Expecting value\)$"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"experts": {"1": [0], "2": [3], "1": [5]}}', "1"),
        ('{"a": 1, "b": 2, "b": 2}', "b"),
        ('[{"c": 1}, {"a": 1, "c": 2, "c": 3, "c": 4}]', "c"),
    ],
)
def test_a_key_that_a_file_has_twice_is_named(tmp_path, text: str, key: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(esft.InputError, match=rf"/x\.json: has the key '{key}' twice$"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[NaN]", "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ("[1e400]", "1e400 is beyond the largest number"),
        ("[1%s]" % ("0" * 5000), "holds a whole number of thousands of digits"),
        ("[" * 100_000 + "]" * 100_000, "JSON that is nested too deeply"),
        ('{"a":' * 100_000, "JSON that is nested too deeply"),
        ("", r"line 1: not JSON \(Expecting value\)"),
        ("[1] 2", r"line 1: not JSON \(Extra data\)"),
        ('["\x00"]', r"line 1: not JSON \(Invalid control character at\)"),
    ],
    ids=range(9),
)
def test_json_that_could_mean_two_things_or_never_ends_is_named(text: str, message: str):
    with pytest.raises(esft.InputError, match=f"^here: {message}$"):
        parse_json(text, "here")


def test_a_line_of_json_is_named_by_its_reader():
    with pytest.raises(esft.InputError, match=r"^d: line 7: not JSON \(Expecting value\)$"):
        parse_json("x", "d: line 7", lines=False)


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "x").write_text("four")
    assert check_regular(tmp_path / "x") == 4
    for path, said in (
        (tmp_path / "pipe", "is no regular file, and is not read"),
        (Path("/dev/zero"), "is no regular file, and is not read"),
        (tmp_path, "Is a directory"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / "x" / "y", "Not a directory"),
        (Path("a\0b"), "embedded null byte"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(esft.InputError, match=f"^{re.escape(str(path))}: {said}$"):
            read_text(path)


def test_a_file_of_more_bytes_than_are_read_is_named(tmp_path):
    (tmp_path / "x").write_text("four")
    assert read_text(tmp_path / "x", most=4) == "four"
    with pytest.raises(esft.InputError, match=r"/x: has 4 bytes; at most 3 are read$"):
        read_text(tmp_path / "x", most=3)
    with open(tmp_path / "big.json", "wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(esft.InputError, match=r"big\.json: has 268,435,457 bytes; at most 268,435,456 are read$"):
        read_json(tmp_path / "big.json")


def test_a_file_that_cannot_be_read_though_it_is_there_is_named(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("of no number")

    (tmp_path / "x").write_text("")
    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(esft.InputError, match=r"/x: of no number$"):
        read_text(tmp_path / "x")


def test_settings_are_texts_with_their_lines(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "\ufeff# first\nlr: 1e-3\nsteps: '7'\n\nclip: ~\nname: null\nb: yes\nt: 1:30\nnext:\n  w\n"
    )
    assert read_settings(tmp_path / "c.yaml") == {
        "lr": ("1e-3", 2), "steps": ("7", 3), "clip": (None, 5), "name": (None, 6), "b": ("yes", 7), "t": ("1:30", 8),
        "next": ("w", 9),
    }  # fmt: skip
    for nothing in ("", "# nothing\n", "null", "---\n"):
        (tmp_path / "c.yaml").write_text(nothing)
        assert read_settings(tmp_path / "c.yaml") == {}


def test_yaml_that_unfolds_is_refused_before_it_does(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(esft.InputError, match=r"c\.yaml: line 1: not YAML \(anchors are not supported\)$"):
        read_settings(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("key", "number"),
    [("0", 0), ("7", 7), ("99", 99), ("100", None), ("07", None), ("-1", None), ("", None), ("1 ", None), ("٣", None),
     ("1" * 5000, None), (7, None), (None, None)],
)  # fmt: skip
def test_a_key_is_a_number_as_python_writes_it(key: object, number: int | None):
    assert key_number(key, 100) == number


def test_a_bad_value_is_shown_in_short():
    assert shown("x") == "'x'" and shown([1, 2]) == "[1, 2]"
    assert len(shown("x" * 10_000)) < 100 and len(shown(list(range(10_000)))) < 200
    deep: list = []
    for _ in range(60):
        deep = [deep, deep]
    assert len(shown(deep)) < 10_000


def test_an_unknown_key_is_named_with_the_one_that_is_meant():
    check_keys(["a", "b"], ["a", "b", "c"], esft.InputError)
    for key, said in (("stepz", "'stepz' (is 'steps' meant?)"), ("q", "'q'; there are steps, lr")):
        with pytest.raises(esft.InputError, match=f"^{re.escape(said)}$"):
            check_keys(["lr", key], ["steps", "lr"], esft.InputError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!null [1]", "not a mapping of settings"),
        ("just words", "not a mapping of settings"),
        ("lr: 1\n[a, b]: 1", "line 2: a setting's name must be a word"),
        ("lr: 1\nlr: 2", "line 2: 'lr' is set twice, first in line 1"),
        ("lr: [1]", "line 1: 'lr' must have a single plain value"),
        ("lr: !!str [1]", "line 1: 'lr' must have a single plain value"),
        ("lr: 2020-01-01", "line 1: 'lr' must have a single plain value"),
        ("\nlr: !!binary aGVsbG8=", "line 2: 'lr' must have a single plain value"),
        ("a: 'b", "line 1: not YAML (found unexpected end of stream)"),
    ],
)
def test_yaml_that_is_no_mapping_of_names_to_single_values_is_refused(tmp_path, text: str, said: str):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(esft.InputError, match=f"c\\.yaml: {re.escape(said)}$"):
        read_settings(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "'': is no path"),
        ("x" * 300, r"'x+\.\.\.x+': File name too long"),
        ("x" * 300 + "/y", r"'x+\.\.\.x+/y': File name too long"),
        ("a\0b", r"'a\\x00b': embedded null byte"),
        ("d/" * 300, r"'d/.*d/': lies more than 256 folders deep"),
    ],
    ids=["empty", "long", "long above", "null", "deep"],
)
def test_what_no_file_can_be_called_is_told(name: str, said: str):
    with pytest.raises(esft.InputError, match=f"^{said}$") as raised:
        check_name(name)
    assert len(str(raised.value)) < 200


def test_what_a_file_can_be_called_passes_whether_it_is_there_or_not(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "absent", "absent/x", "file/x", "x" * 255, "a\nb", "-x", " ", "\udcff"):
        check_name(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 60_000, "{" * 60_000, "- " * 30_000, "? " * 30_000, "a: " + "[" * 3000 + "\n"])
def test_settings_of_many_levels_are_told_of_at_once(tmp_path, text: str):
    """Not only where Python's own limit ends it, which is another one in every program."""
    (tmp_path / "x.yaml").write_text(text)
    before, started = sys.getrecursionlimit(), time.monotonic()
    sys.setrecursionlimit(100_000)
    try:
        with pytest.raises(esft.InputError, match=r"/x\.yaml: (line 1: )?(YAML that is nested too deeply|not YAML)"):
            read_settings(tmp_path / "x.yaml")
    finally:
        sys.setrecursionlimit(before)
    assert time.monotonic() - started < 5


def test_settings_may_be_as_many_as_there_are(tmp_path):
    (tmp_path / "x.yaml").write_text("".join(f"a{i}: {i}\n" for i in range(300)))
    assert read_settings(tmp_path / "x.yaml") == {f"a{i}": (str(i), i + 1) for i in range(300)}


def test_values_are_found_below_names_at_any_depth_and_anchors_do_not_unfold():
    text = "a:\n- data: {x: one, y: [two]}\n  else: no\ndata: three\nsep: '::'"
    assert sorted(texts_below(text, ("data", "dir"), "c")) == ["one", "three", "two", "x", "y"]
    assert list(texts_below("- a\n- b", ("data",), "c")) == list(texts_below("", ("data",), "c")) == []
    doubled = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)), "data: *a59"])
    assert list(texts_below(doubled, ("data",), "c")) == ["x"]
    with pytest.raises(InputError, match="^c: YAML that is nested too deeply$"):
        list(texts_below("[" * 5000, ("data",), "c"))
