"""Which backend computes where, and what is said where none can."""

import importlib

import pytest
import torch

from esft_kernels.backends import reference
from esft_kernels.backends.resolve import BACKENDS, resolve_backend

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("name", ["cpu", "cpu_packed", "reference", "triton"])
def test_a_backend_is_the_module_of_its_name(name):
    module = "triton_backend" if name == "triton" else name
    if name == "triton":
        pytest.importorskip("triton")
    assert resolve_backend(name, CPU).__name__ == f"esft_kernels.backends.{module}"
    assert name in BACKENDS


def test_auto_is_the_cpu_path_on_a_cpu_and_triton_elsewhere(monkeypatch):
    pytest.importorskip("triton")
    assert resolve_backend("auto", CPU).__name__ == "esft_kernels.backends.cpu"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a device of its own needs no interpreter
    for device in (META, torch.device("cuda")):
        assert resolve_backend("auto", device).__name__ == "esft_kernels.backends.triton_backend"
        assert resolve_backend("triton", device).__name__ == "esft_kernels.backends.triton_backend"
        assert resolve_backend("reference", device) is reference


def test_a_name_that_is_no_backend_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="one of auto, triton, cpu, cpu_packed, reference, got 'cuda'"):
        resolve_backend("cuda", CPU)


@pytest.mark.parametrize("name", ["cpu", "cpu_packed"])
def test_the_cpu_paths_refuse_tensors_of_a_device(name):
    with pytest.raises(ValueError, match=f"backend '{name}' computes on CPU tensors, got tensors on meta"):
        resolve_backend(name, META)


def test_packed_weights_need_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="backend 'cpu_packed' needs a PyTorch with oneDNN"):
        resolve_backend("cpu_packed", CPU)
    assert resolve_backend("cpu", CPU).__name__ == "esft_kernels.backends.cpu"


@pytest.mark.parametrize("value", [None, "0"])
def test_triton_refuses_cpu_tensors_without_the_interpreter(value, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve_backend("triton", CPU)


def test_a_missing_triton_is_named_and_another_missing_module_is_not_taken_for_it(monkeypatch):
    def missing(name: str):
        def import_module(*_):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(importlib, "import_module", import_module)

    missing("triton")
    with pytest.raises(ValueError, match="needs the triton package, which is not installed here"):
        resolve_backend("triton", META)
    missing("numpy")
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        resolve_backend("triton", META)
