import pytest
import torch
from torch import nn

from esft.optimizer.adamw import MasterAdamW, kernel_on
from esft.runs.config import TrainConfig
from esft_kernels.adamw import adamw_step
from tests.esft.optimizer.courses import assert_alike, by_kernel, by_passes, course
from tests.esft_kernels.adamw import KINDS, State, assert_stepped, made, step_in_float64
from tests.gpu.device import DEVICE, REHEARSAL, gpu_only, sized

SETTINGS = {"lr": 0.02, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.3, "eps": 1e-8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", sized([1, 1000, (1 << 20) + 1, 1 << 24], [1000]))
def test_every_step_is_that_of_adamw_in_float64(kind: str, count: int):
    state = made(kind, count, device=DEVICE)
    for step in range(1, 4):
        gradient = torch.randn(count, device=DEVICE).mul(10.0 ** (step - 4)).to(state.gradient.dtype)
        shrink = torch.tensor(0.3 if step % 2 else 1.0, device=DEVICE)
        expected = step_in_float64(state, gradient, float(shrink), step, **SETTINGS)
        adamw_step(state.weight, state.beside, gradient, state.mean, state.square, shrink, step, **SETTINGS)
        assert_stepped(state, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_kernel_steps_as_passes_do(name: str, dtype: torch.dtype):
    args = course, TrainConfig(optimizer=name), dtype, sized((4099, 4500), (3, 300)), range(3), None, DEVICE
    assert_alike(by_kernel(*args), by_passes(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_step_takes_no_memory_and_knows_the_norm(dtype: torch.dtype):
    p = nn.Parameter(torch.ones(sized(1 << 25, 1000), dtype=dtype, device=DEVICE))
    optimizer = MasterAdamW([("p", p)], TrainConfig())
    for _ in range(2):
        p.grad = torch.randn_like(p)
        exact = float(torch.linalg.vector_norm(p.grad, dtype=torch.float64))
        if not REHEARSAL:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        assert by_kernel(optimizer.step, 0.01) == pytest.approx(exact, rel=1e-6)
        assert REHEARSAL or torch.cuda.max_memory_allocated() - before < 1 << 20


@gpu_only
def test_the_optimizer_has_the_kernel_here():
    assert kernel_on(DEVICE) is adamw_step


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_elements_past_what_32_bit_offsets_reach(kind: str, much_memory):
    count, few = sized(2**31 + 3000, 3000), sized(2000, 10)
    zeros = State(*(None if t is None else t.new_zeros(count) for t in vars(made(kind, 1, device=DEVICE)).values()))
    shrink = torch.tensor(0.5, device=DEVICE)
    start, end = slice(few), slice(count - few, count)
    expected = []
    for part in (start, end):
        values = vars(made(kind, few, device=DEVICE))
        for name, tensor in vars(zeros).items():
            if tensor is not None:
                tensor[part] = torch.randn(few, device=DEVICE) if name == "gradient" else values[name]
        state = State(*(None if t is None else t[part].clone() for t in vars(zeros).values()))
        expected.append(step_in_float64(state, state.gradient, 0.5, 1, **SETTINGS))
    adamw_step(zeros.weight, zeros.beside, zeros.gradient, zeros.mean, zeros.square, shrink, 1, **SETTINGS)
    for part, right in zip((start, end), expected, strict=True):
        assert_stepped(State(*(None if t is None else t[part] for t in vars(zeros).values())), right)
    middle = slice(few, count - few)
    assert not any(t[middle].count_nonzero() for t in vars(zeros).values() if t is not None)
