"""Merged checkpoints and adapters on a disk that is full."""

import importlib
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest

import esft
from esft.selection import ExpertSelection
from tests.esft.adapters.tuned import tune
from tests.esft.models import save_tiny


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


LIMITED = """
import resource, sys
from pathlib import Path
import esft
from esft.checkpoint.load import load_model
from esft.selection import ExpertSelection

base, adapter, out = map(Path, sys.argv[1:])
model = esft.swap(load_model(str(base)), ExpertSelection({1: [3]}))
for limit, write in (
    ((base / "model.safetensors").stat().st_size - 1, lambda: esft.merge(base, adapter, out)),
    (5000, lambda: esft.save_adapter(model, out)),
):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write()
    except esft.DiskError as error:
        print(error)
"""


@pytest.mark.slow
def test_the_systems_own_limit_on_a_file_is_one_error_for_merged_checkpoints_and_adapters(tmp_path):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", LIMITED, base, tmp_path / "a", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    merged, saved = done.stdout.splitlines()
    assert merged == f"{tmp_path / 'out'}: File too large"
    assert saved.startswith(f"{tmp_path / 'out'}: ") and "File too large" in saved
    assert sorted(tmp_path.rglob("*")) == before
