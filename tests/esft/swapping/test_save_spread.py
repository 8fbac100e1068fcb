"""Saving a swapped model of which every rank has a part."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import esft
from esft.errors import DiskError, InputError
from esft.experts.moe_layers import dealt_pools, is_apart
from esft.parallel.join import joined
from esft.parallel.sharding import shard_frozen
from esft.selection import ExpertSelection
from tests.esft import zoo
from tests.esft.models import FAMILIES, tiny_model
from tests.esft.parallel.jobs import job

save_spread = importlib.import_module("esft.swapping.save_spread")

SELECTION = ExpertSelection({1: [2, 7, 5], 2: [0]})
ONE_FILE = 1 << 30
# Experts one by one in files; stacked, turned and with biases; tied embeddings. Small files; cut up, or both.
SAVED = {
    "one by one": ("deepseek_v2", "dealt", ONE_FILE),
    "stacked": ("gpt_oss", "dealt", ONE_FILE),
    "many files": ("deepseek_v2", "dealt", 50_000),
    "cut up": ("deepseek_v2", "cut up", ONE_FILE),
    "both": ("deepseek_v2", "dealt and cut up", ONE_FILE),
}


def tuned(family: str, **spread):
    """Swapped, with trained weights that are no longer the base's."""
    model = tiny_model(family) if family in FAMILIES else zoo.tiny(family)
    selection = SELECTION if family in FAMILIES else ExpertSelection({0: [3, 1]})
    esft.swap(model, selection, **spread)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    return model


def saves(folder: Path) -> list:
    """Every one of ``SAVED``. Returns why the one that is refused is, and whether its folder is there."""
    with joined() as ranks:
        for name, (family, how, size) in SAVED.items():
            save_spread.FILE = size
            model = tuned(family, **({"ranks": ranks} if "dealt" in how else {}))
            if "cut up" in how:
                shard_frozen(model, ranks, torch.device("cpu"), dealt_pools(model))
            assert is_apart(model)
            model.save_pretrained(folder / name)
        try:
            model.save_pretrained(folder / "refused", max_shard_size="1GB")
        except InputError as error:
            return [str(error), (folder / "refused").exists()]
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spread")
    ended = job(folder, 2, partial(saves, folder))
    assert [e.status for e in ended] == [0, 0], ended
    refused = "a model whose weights are spread over ranks is saved without further arguments"
    assert [e.value for e in ended] == [[refused, False]] * 2
    return folder


@pytest.mark.parametrize("name", SAVED)
def test_the_files_are_those_of_a_single_process(folder, tmp_path, name: str):
    tuned(SAVED[name][0]).save_pretrained(tmp_path)
    expected, found = load_file(tmp_path / "model.safetensors"), {}
    files = sorted((folder / name).glob("*.safetensors"))
    for file in files:
        found |= load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], tensor) and found[n].dtype == tensor.dtype for n, tensor in expected.items())
    assert (folder / name / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert not (folder / name / save_spread.NEW).exists()
    if name != "many files":
        assert [file.name for file in files] == ["model.safetensors"]
        assert files[0].read_bytes() == (tmp_path / "model.safetensors").read_bytes()
        assert not (folder / name / "model.safetensors.index.json").exists()


def test_several_files_have_an_index_and_are_of_the_size_that_is_said(folder):
    index = json.loads((folder / "many files" / "model.safetensors.index.json").read_text())
    files = sorted((folder / "many files").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 3
    held = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {tensor: name for name, tensors in held.items() for tensor in tensors}
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= 50_000
    loaded = AutoModelForCausalLM.from_pretrained(folder / "many files")
    expected = esft.unswap(tuned("deepseek_v2"))
    assert all(torch.equal(p, expected.get_parameter(n)) for n, p in loaded.named_parameters())


@pytest.mark.parametrize(
    ("error", "seen"), [(SafetensorError("no space left"), DiskError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_earlier_checkpoint_stays_until_all_weights_are_written(tmp_path, monkeypatch, error, seen):
    def save_file(tensors, path, metadata):
        files.append(path.name)
        path.write_bytes(b"a part")
        if len(files) == 3:
            raise error

    files: list[str] = []
    monkeypatch.setattr(save_spread, "FILE", 50_000)
    monkeypatch.setattr(save_spread, "save_file", save_file)
    (tmp_path / "model.safetensors").write_bytes(b"an earlier one")
    (tmp_path / save_spread.NEW).mkdir()  # of a process that was killed
    (tmp_path / save_spread.NEW / "7").write_bytes(b"a part")
    with pytest.raises(seen):
        save_spread.save_spread(tuned("deepseek_v2"), tmp_path, True, (tmp_path / "model.safetensors").unlink)
    assert files == ["0", "1", "2"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model.safetensors": b"an earlier one"}


@pytest.mark.parametrize("size", [ONE_FILE, 200_000])
def test_of_an_earlier_checkpoint_in_another_number_of_files_nothing_says_where_weights_are(
    tmp_path, monkeypatch, size: int
):
    monkeypatch.setattr(save_spread, "FILE", size)
    for name in (save_spread.WHOLE, save_spread.INDEX):
        (tmp_path / name).write_text("an earlier one's")
    save_spread.save_spread(tuned("deepseek_v2"), tmp_path, True, lambda: None)
    here = {name for name in (save_spread.WHOLE, save_spread.INDEX) if (tmp_path / name).exists()}
    assert here == ({save_spread.WHOLE} if size == ONE_FILE else {save_spread.INDEX})
    assert all("an earlier" not in (tmp_path / name).read_text(errors="ignore") for name in here)


def test_cut_up_experts_in_few_bits_are_refused_before_anything_is_written(tmp_path):
    model = esft.swap(tiny_model(moe_intermediate_size=32), SELECTION, frozen="nf4")
    with pytest.raises(InputError, match="experts in nf4 that are cut up over ranks cannot be saved whole"):
        save_spread.save_spread(model, tmp_path / "new", True, lambda: None)
    assert not [*tmp_path.iterdir()]


def test_a_model_that_is_whole_is_not_apart():
    assert not is_apart(tuned("deepseek_v2"))
