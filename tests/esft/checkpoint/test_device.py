import os
import subprocess
import sys

import pytest
import torch

import esft
from esft.checkpoint import load as loading
from esft.checkpoint.device import compute_dtype, first_device, in_host_memory, on_one_device, placement
from esft.checkpoint.load import load_model
from tests.esft.models import save_tiny


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count: int, usable: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable and count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    "count, wanted", [(0, {}), (1, {"device_map": "cuda"}), (2, {"device_map": "auto"}), (3, {"device_map": "auto"})]
)
def test_a_model_goes_to_the_gpus_that_there_are(gpus, count, wanted):
    gpus(count)
    assert placement() == wanted
    gpus(count, usable=False)  # as where the driver is too old
    assert placement() == {}


def test_each_of_several_processes_has_a_whole_model_on_its_own_gpu(gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    gpus(0)
    assert placement() == {} and first_device() == torch.device("cpu")
    gpus(4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert placement() == {"device_map": {"": torch.device("cuda:3")}} and on_one_device()
    assert first_device() == torch.device("cuda:3")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert first_device() == torch.device("cuda") and not on_one_device()


def test_a_model_stays_in_the_cpus_memory_where_that_is_wanted(gpus):
    gpus(2)
    with in_host_memory(True):
        assert placement() == {} and first_device() == torch.device("cpu") and on_one_device()
        with in_host_memory(False):
            assert placement() == {"device_map": "auto"} and first_device() == torch.device("cuda")
        assert placement() == {}
    assert placement() == {"device_map": "auto"}


@pytest.mark.parametrize(
    "count, capabilities, dtype",
    [
        (0, {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        (0, {"avx512_bf16": True, "amx_bf16": False}, "auto"),
        (0, {"amx_bf16": True}, "auto"),
        (0, {"bf16": True}, "auto"),  # Arm
        (0, {"bf16_emulated": True, "bf1": True}, "float32"),
        (0, {}, "float32"),
        (1, {}, "auto"),
    ],
)
def test_a_cpu_without_bf16_arithmetic_computes_in_float32(gpus, monkeypatch, count, capabilities, dtype):
    gpus(count)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert compute_dtype("auto") == dtype
    assert compute_dtype("bfloat16") == "bfloat16" and compute_dtype("float32") == "float32"


def test_load_model_asks_for_both(gpus, monkeypatch, tmp_path):
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    gpus(0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    model = load_model(str(base))
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert load_model(str(base), "bfloat16").dtype == torch.bfloat16

    gpus(2)
    asked = {}
    monkeypatch.setattr(loading, "AutoModelForCausalLM", type("", (), {
        "from_pretrained": staticmethod(lambda path, **options: asked.update(options) or (model, {"missing_keys": []}))
    }))  # fmt: skip
    load_model(str(base))
    assert asked["device_map"] == "auto" and asked["dtype"] == "auto"
    model.lm_head.to("meta")  # as where accelerate leaves to the disk what the GPUs do not hold
    with pytest.raises(esft.InputError, match=r"base: does not fit the memory of the GPUs \(lm_head.weight"):
        load_model(str(base))


@pytest.mark.slow
def test_no_operation_mixes_devices():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.esft.pretend_gpus"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
