"""What a checkpoint's folder may hold, whichever way it is read."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig

import esft
from esft.checkpoint import source
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model
from esft.checkpoint.source import (
    INDEX,
    WEIGHTS,
    Reach,
    check_dtypes,
    check_folder,
    configuration_digests,
    open_config,
    weight_files,
)
from tests.esft.checkpoint.files import rewrite, rewrite_json
from tests.esft.models import save_tiny, tiny_model

HEAD = "lm_head.weight"
CODE = "from transformers import PreTrainedConfig\nopen({!r}, 'w').write('run')\nclass C(PreTrainedConfig): pass\n"


@pytest.fixture(params=[Checkpoint.open, lambda folder: load_model(str(folder))], ids=["merge", "score"])
def read(request):
    """The two ways in which commands read a checkpoint."""
    return request.param


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    save_tiny(folder / "whole")
    tiny_model().save_pretrained(folder / "shards", max_shard_size="100KB")
    return folder


@pytest.fixture
def base(tmp_path, bases):
    return Path(shutil.copytree(bases / "whole", tmp_path / "base"))


@pytest.fixture
def shards(tmp_path, bases):
    return Path(shutil.copytree(bases / "shards", tmp_path / "shards"))


def test_what_is_sound_is_read(read, base, shards):
    read(base)
    read(shards)
    assert set(weight_files(base).values()) == {WEIGHTS}
    assert weight_files(shards) == json.loads((shards / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"config\.json: line 1: not JSON"),
        ("config.json", "[]", r"config\.json: not a model's configuration, which is a mapping"),
        ("config.json", '{"model_type": "unheard_of"}', r"config\.json: not a model's configuration \(."),
        ("config.json", '{"model_type": 7}', r"config\.json: not a model's configuration \(."),
        ("config.json", '{"model_type": "olmoe", "model_type": "mixtral"}', "has the key 'model_type' twice"),
        ("config.json", '{"model_type": "olmoe", "rope_theta": NaN}', "NaN is no JSON number"),
        (
            "config.json",
            '{"model_type": "olmoe", "num_attention_heads": 0}',
            "num_attention_heads is 0, which no model",
        ),
        (
            "config.json",
            '{"model_type": "olmoe", "num_experts": 1000000000}',
            "num_experts is 1000000000; at most 65,536",
        ),
        ("config.json", '{"model_type": "olmoe", "num_hidden_layers": 10000000}', "at most 500 are supported"),
        (INDEX, "{}", r"index\.json: has no weight_map"),
        (INDEX, "null", r"index\.json: has no weight_map"),
        (INDEX, "[]", r"index\.json: has no weight_map"),
        (INDEX, '{"weight_map": {}}', r"index\.json: has no weight_map"),
        (INDEX, '{"weight_map": ["model.safetensors"]}', r"index\.json: has no weight_map"),
        (
            INDEX,
            '{"metadata": {}, "weight_map": {"a": "absent.safetensors"}}',
            "holds model.safetensors and an index of other files",
        ),
        (
            INDEX,
            '{"metadata": {}, "weight_map": {"a": "absent.safetensors", "b": "model.safetensors"}}',
            "holds model.safetensors and an index of other files",
        ),
        (WEIGHTS, "nonsense", r"model\.safetensors: not a readable safetensors file"),
    ],
    ids=range(17),
)
def test_a_damaged_folder_is_refused(read, base, file: str, text: str, message: str):
    (base / file).write_text(text)
    with pytest.raises(esft.InputError, match=message):
        read(base)


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere/model.safetensors", "/elsewhere/model.safetensors", "sub/model.safetensors", "", 7, None, "..",
        "pytorch_model.bin", "safetensors", "a\\b.safetensors", "a\0.safetensors", "..safetensors", "a.safetensors\n",
    ],
)  # fmt: skip
def test_an_index_that_names_no_file_of_its_folder_is_refused(read, shards, name):
    save_tiny(shards.parent / "elsewhere")
    rewrite_json(shards / INDEX, lambda index: index["weight_map"].update({HEAD: name}))
    with pytest.raises(esft.InputError, match=r"index\.json: .* is not the name of a safetensors file in this folder"):
        read(shards)


def test_a_file_that_the_index_names_and_the_folder_lacks_is_named(read, shards):
    file = weight_files(shards)[HEAD]
    (shards / file).unlink()
    with pytest.raises(esft.InputError, match=rf"shards/{file}: No such file"):
        read(shards)


def test_pickles_are_never_loaded_and_it_is_said_how_to_convert_them(read, base):
    torch.save({}, base / "pytorch_model.bin")
    read(base)
    (base / WEIGHTS).unlink()
    with pytest.raises(esft.InputError, match=rf"base: no {WEIGHTS} and no {INDEX}; pickled .*never.* python -c .*OUT"):
        read(base)
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(esft.InputError, match=r"base: no model\.safetensors .* \(pickled weights are never loaded\)$"):
        read(base)


def test_a_folder_without_a_config_is_refused(read, base):
    (base / "config.json").rename(base / "other.json")
    with pytest.raises(esft.InputError, match=r"base: not a checkpoint folder \(no config\.json\)"):
        read(base)
    (base / "config.json").mkdir()
    with pytest.raises(esft.InputError, match=r"config\.json: Is a directory"):
        read(base)


def test_a_base_with_two_sets_of_weights_is_refused_and_an_index_of_the_one_file_is_not(read, base, shards):
    shutil.copyfile(shards / INDEX, base / INDEX)
    with pytest.raises(esft.InputError, match=r"base: holds model\.safetensors and an index of other files"):
        read(base)
    rewrite_json(base / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], WEIGHTS)))
    read(base)


def test_a_pipe_or_an_adapter_in_the_folder_is_told_of_before_anything_waits_for_it(read, base):
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(esft.InputError, match="base: holds a PEFT adapter, not a model"):
        read(base)
    (base / "adapter_config.json").unlink()
    os.mkfifo(base / "generation_config.json") if not (base / "generation_config.json").exists() else None
    os.mkfifo(base / "some.json")
    with pytest.raises(esft.InputError, match="is no regular file, and is not read"):
        read(base)


def test_a_folder_that_cannot_be_looked_into_is_named(read, base, monkeypatch):
    def closed(path: Path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(esft.InputError, match="base: Permission denied$"):
        read(base)


def test_code_of_a_checkpoint_is_not_run_and_nobody_is_asked(read, base, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    (base / "code.py").write_text(CODE.format(str(base / "mark")))
    change = {"model_type": "of_their_own", "auto_map": {"AutoConfig": "code.C"}}
    rewrite_json(base / "config.json", lambda config: config.update(change))
    with pytest.raises(
        esft.InputError, match=r"config\.json: names Python code of its own; .* `trust_remote_code=True`$"
    ):
        read(base)
    assert not (base / "mark").exists()
    assert type(open_config(base, trust_remote_code=True)).__name__ == "C"
    assert (base / "mark").read_text() == "run"


@pytest.mark.parametrize(
    "path", ["no/such/folder", "./absent", "/absent", "~/x", "a/b/c", "", "a\0b", "x" * 300 + "/.y"]
)
def test_a_folder_that_is_not_there_is_called_so(path: str):
    for opens in (open_config, weight_files):
        with pytest.raises(esft.InputError, match="no such folder$"):
            opens(path)


def test_a_name_that_the_hub_could_have_is_looked_up_there(tmp_path, monkeypatch):
    with pytest.raises(
        esft.InputError, match=r"^absent: no such folder, and no model of that name can be had from the hub"
    ):
        open_config("absent")
    assert check_folder("some/where") is None
    (tmp_path / "index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    monkeypatch.setattr(source, "hf_hub_download", lambda model, name: str(tmp_path / "index.json"))
    with pytest.raises(esft.InputError, match="'../b.safetensors' is not the name of a safetensors file"):
        weight_files("some/where")

    def fails(*_):
        raise source.EntryNotFoundError("none") if missing else OSError("no net")

    monkeypatch.setattr(source, "hf_hub_download", fails)
    missing = True
    assert weight_files("some/where") == {}
    missing = False
    with pytest.raises(esft.InputError, match=r"^some/where: cannot be had from the hub \(no net\)$"):
        weight_files("some/where")


def test_a_file_is_no_checkpoint_folder(tmp_path):
    (tmp_path / "x").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("x", "loop"):
        with pytest.raises(esft.InputError, match=f"{name}: is a file, not a checkpoint folder$"):
            check_folder(tmp_path / name)


def config(**more: object) -> PreTrainedConfig:
    return PreTrainedConfig(**more)


def test_a_model_reaches_as_far_as_its_text_model_says():
    assert Reach.of(config(max_position_embeddings=7, vocab_size=9)) == Reach(7, 9)
    assert Reach.of(config()) == Reach(None, None)
    inner = SimpleNamespace(max_position_embeddings=0, vocab_size="x")
    assert Reach.of(SimpleNamespace(get_text_config=lambda: inner)) == Reach(None, None)


def test_a_length_is_at_most_the_positions_and_4096_or_these_where_none_is_asked_for():
    assert [Reach(p, None).length(None) for p in (None, 100, 8192)] == [4096, 100, 4096]
    assert [Reach(p, None).length(100) for p in (None, 100, 8192)] == [100] * 3
    with pytest.raises(esft.InputError, match="^`max_length=101` is beyond the model's 100 positions$"):
        Reach(100, None).length(101)


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.int32, "is I32, and none is of floating point"), (torch.complex64, "is C64, which no")]
)
def test_weights_that_no_model_computes_in_are_refused(tmp_path, dtype: torch.dtype, said: str):
    base = save_tiny(tmp_path / "base")
    files, plain = weight_files(base), PreTrainedConfig()
    check_dtypes(base, files, plain)
    rewrite(base, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    with pytest.raises(esft.InputError, match=f"base/model.safetensors: tensor .* {said}"):
        check_dtypes(base, files, plain)


def test_weights_are_quantized_where_the_configuration_says_so(read, base):
    for settings in ({"quant_method": "fp8"}, {}):
        rewrite_json(base / "config.json", lambda config, new=settings: config.update(quantization_config=new))
        with pytest.raises(
            esft.InputError, match=r"config\.json: has a quantization_config, and no tensor is quantized"
        ):
            read(base)
    rewrite_json(base / "config.json", lambda config: config.update(quantization_config=None))
    read(base)
    quantized = PreTrainedConfig(quantization_config={"quant_method": "fp8"})
    scale = {f"{HEAD}_scale_inv": torch.ones(3, 1)}
    rewrite(base, lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.float8_e4m3fn)} | scale))
    check_dtypes(base, weight_files(base), quantized)


def test_weights_all_in_few_bits_are_none_of_floating_point(base):
    few = torch.float8_e4m3fn
    rewrite(base, lambda tensors: tensors.update({name: tensor.to(few) for name, tensor in tensors.items()}))
    with pytest.raises(esft.InputError, match="is F8_E4M3, and none is of floating point$"):
        check_dtypes(base, weight_files(base), PreTrainedConfig())


@pytest.mark.parametrize("metadata", [None, "x", 5])
def test_an_index_without_metadata_is_refused(read, shards, metadata):
    rewrite_json(shards / INDEX, lambda index: index.update(metadata=metadata))
    with pytest.raises(esft.InputError, match=r"index\.json: has no metadata, which is a mapping"):
        read(shards)


def test_an_index_that_is_wrong_about_a_file_is_refused(read, shards):
    first, other = sorted(set(weight_files(shards).values()))[:2]
    name = next(name for name, file in weight_files(shards).items() if file == first)
    rewrite_json(shards / INDEX, lambda index: index["weight_map"].update({name: other}))
    with pytest.raises(esft.InputError, match=f"{other}: holds no tensor {name}, as the index says it does$"):
        read(shards)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"line 1: not JSON \(."),
        ("[]", "not a mapping of settings"),
        ('{"max_new_tokens": -5}', r"not settings of a generation \(.*max_new_tokens"),
        ('{"cache_implementation": "x"}', r"not settings of a generation \(.*cache_implementation"),
        (None, "Is a directory"),
    ],
)
def test_generation_settings_that_are_none_are_refused_and_not_passed_over(read, base, text, said: str):
    (base / "generation_config.json").unlink()
    read(base)
    if text is None:
        (base / "generation_config.json").mkdir()
    else:
        (base / "generation_config.json").write_text(text)
    with pytest.raises(esft.InputError, match=rf"base/generation_config\.json: {said}"):
        read(base)


def test_digests_of_a_configuration_are_another_when_it_or_code_beside_it_changes(tmp_path):
    seen = [configuration_digests("hub/id"), configuration_digests(tmp_path)]
    assert seen == [(), ()]
    for name, text in (("config.json", "1"), ("config.json", "2"), ("modeling.py", "1"), ("modeling.py", "2")):
        (tmp_path / name).write_text(text)
        found = configuration_digests(tmp_path)
        assert found not in seen
        seen.append(found)
        (tmp_path / "other.txt").write_text(name + text)
        assert configuration_digests(tmp_path) == found
