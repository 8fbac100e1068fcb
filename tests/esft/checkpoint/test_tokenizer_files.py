import base64
import shutil
from pathlib import Path

import pytest
from tokenizers.normalizers import Precompiled

import esft
from esft.checkpoint.load import load_tokenizer
from esft.checkpoint.tokenizer_files import check_tokenizer_files, flaw_of
from tests.esft.checkpoint.files import rewrite_json
from tests.esft.models import tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "base"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"])
@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "line 1: not JSON"), ("[]", "not a mapping"), ("null", "not a mapping"), ('{"a": 1, "a": 2}', "twice")],
)
def test_a_file_that_is_no_json_mapping_is_named(folder, name: str, text: str, said: str):
    check_tokenizer_files(folder)
    (folder / name).write_text(text)
    with pytest.raises(esft.InputError, match=f"base/{name}: .*{said}"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("text", ['{"version": "1.0"}', '{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_a_tokenizer_that_lacks_a_part_is_named(folder, text: str):
    assert flaw_of(folder / "tokenizer.json") is None and flaw_of(folder / "absent.json") is None
    (folder / "tokenizer.json").write_text(text)
    flaw = flaw_of(folder / "tokenizer.json")
    assert isinstance(flaw, str) and flaw and "\n" not in flaw  # a line for a message
    with pytest.raises(esft.InputError, match=r"base/tokenizer\.json: cannot load a tokenizer \(."):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xef\xbb\xbf{{ x }}", "begins with a byte order mark, .*take it out"), (b"\xff\xfe{", "not UTF-8 text")],
)
def test_a_template_that_would_render_otherwise_than_it_looks_is_named(folder, name: str, content: bytes, said: str):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(esft.InputError, match=f"base/{name}: {said}"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
@pytest.mark.parametrize("pattern", [{"String": ""}, {"Regex": ""}])
def test_a_pattern_on_which_compiled_code_breaks_off_is_named(folder, part: str, pattern: dict):
    step = {"type": "Replace", "pattern": pattern, "content": "x"}
    rewrite_json(folder / "tokenizer.json", lambda whole: whole.update({part: {"type": "Sequence", "steps": [step]}}))
    with pytest.raises(esft.InputError, match=r"base/tokenizer\.json: has an empty pattern, "):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "raw", [b"", b"\0\0\0", b"\4\0\0\0abcd", b"\4\0\0\0abcdef\0", b"\4\0\0\0\0\0\0\0\xff", b"\x08\0\0\0abcd"]
)
def test_a_map_of_characters_that_is_none_is_named_and_no_other(folder, raw: bytes):
    normalizer = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}
    rewrite_json(folder / "tokenizer.json", lambda whole: whole.update(normalizer=normalizer))
    try:
        Precompiled(raw)
    except Exception:  # read from JSON it is a panic
        with pytest.raises(
            esft.InputError, match=r"tokenizer\.json: has a precompiled_charsmap that is none, on which"
        ):
            load_tokenizer(str(folder))
    else:
        load_tokenizer(str(folder))


def test_a_tokenizer_that_draws_its_tokens_is_named(folder):
    rewrite_json(folder / "tokenizer.json", lambda whole: whole["model"].update(dropout=0.0))
    load_tokenizer(str(folder))
    rewrite_json(folder / "tokenizer.json", lambda whole: whole["model"].update(dropout=0.1))
    with pytest.raises(esft.InputError, match=r"base/tokenizer\.json: splits texts at random \(dropout is 0\.1\)$"):
        load_tokenizer(str(folder))


def test_a_link_that_leads_nowhere_is_named(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to("nowhere")
    with pytest.raises(esft.InputError, match=r"base/tokenizer_config\.json: No such file"):
        check_tokenizer_files(folder)
