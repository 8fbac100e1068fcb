"""Merged checkpoints and adapters on a disk that is full."""

import importlib
import os
import resource
import shutil
from functools import partial

import pytest

import esft
from esft.selection import ExpertSelection
from tests.esft.adapters.tuned import tune
from tests.esft.models import save_tiny
from tests.esft.processes import forked, status


@pytest.mark.parametrize("place", ["first copy", "last copy", "patch", "manifest", "rename"])
def test_a_disk_that_fills_up_leaves_the_old_output_whole_and_nothing_else(tmp_path, monkeypatch, place: str):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    esft.merge(base, tmp_path / "a", tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # ``esft.merge`` names the function; its module is found by import.
    module = importlib.import_module("esft.adapters.merge")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(base / "model.safetensors"))

    def last(copyfile, source, target):
        copyfile(source, target)
        if len(list(target.parent.iterdir())) == len(list(base.iterdir())):
            full()

    def second(replace, source, target):  # puts the old output aside, and then fails to set the new one
        full() if str(source).endswith("/.out.esft/new") else replace(source, target)

    if place in ("first copy", "last copy"):
        monkeypatch.setattr(module.shutil, "copyfile", full if place[0] == "f" else partial(last, shutil.copyfile))
    elif place == "patch":
        monkeypatch.setattr(module._Patch, "content", full)
    elif place == "manifest":
        monkeypatch.setattr(module, "write_json", full)
    else:
        monkeypatch.setattr("esft.storage.outputs.os.replace", partial(second, os.replace))
    with pytest.raises(esft.DiskError, match=r"/out(/esft_manifest.json)?: No space left on device$"):
        esft.merge(base, tmp_path / "a", tmp_path / "out", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_systems_own_limit_on_a_file_is_one_error_for_merged_checkpoints_and_adapters(tmp_path):
    base, out = save_tiny(tmp_path / "base"), tmp_path / "out"
    model = tune(base, ExpertSelection({1: [3]}))
    esft.save_adapter(model, tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))

    def child() -> None:
        size = (base / "model.safetensors").stat().st_size
        for limit, write, said in (
            (size - 1, lambda: esft.merge(base, tmp_path / "a", out), "File too large$"),
            (5000, lambda: esft.save_adapter(model, out), ".*File too large"),
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(esft.DiskError, match=f"^{out}: {said}"):
                write()

    assert status(forked(child)) == 0
    assert sorted(tmp_path.rglob("*")) == before
