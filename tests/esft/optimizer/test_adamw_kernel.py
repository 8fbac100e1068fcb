"""The optimizer with the kernel that steps on a GPU: in Triton's interpreter, held to the passes that step on a CPU."""

from importlib.util import find_spec

import pytest
import torch

from esft.optimizer import adamw
from esft.optimizer.moments import BLOCK
from esft.runs.config import TrainConfig
from tests.esft.optimizer.courses import assert_alike, by_kernel, course


@pytest.mark.skipif(not find_spec("triton"), reason="the kernel needs Triton")
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"weight_decay": 0.0, "clip": 1e9}, torch.bfloat16),
        ({"weight_decay": 0.0}, torch.float16),
        ({"clip": 1e9}, torch.float32),
        ({"optimizer": "adamw_8bit"}, torch.bfloat16),
        ({"optimizer": "adamw_8bit"}, torch.float32),
    ],
)
def test_the_kernel_steps_as_passes_do_and_either_goes_on_from_the_others_state(settings, dtype, monkeypatch):
    monkeypatch.setattr(adamw, "PIECE", 2 * BLOCK)
    config, size = TrainConfig(**settings), (5, 107)
    half, whole = course(config, dtype, size, range(2)), course(config, dtype, size, range(4))
    assert whole["norm"].min() > 10  # the default clips all of them
    rest = {key: t[2:] if key == "norm" else t for key, t in whole.items()}
    resumed = course(config, dtype, size, range(2, 4), by_half := by_kernel(course, config, dtype, size, range(2)))
    assert_alike(by_half, half)
    assert_alike(resumed, rest)
    assert_alike(by_kernel(course, config, dtype, size, range(4)), whole)
    assert_alike(by_kernel(course, config, dtype, size, range(2, 4), half), rest)


def test_there_is_a_kernel_on_a_gpu_where_triton_is(monkeypatch):
    def found(place: str):
        return adamw.kernel_on.__wrapped__(torch.device(place))

    assert found("cpu") is None and found("mps") is None
    if find_spec("triton"):
        from esft_kernels.adamw import adamw_step

        assert found("cuda:1") is adamw_step
    monkeypatch.setattr(adamw, "find_spec", lambda name: None)
    assert found("cuda:1") is None
