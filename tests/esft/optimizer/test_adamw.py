from types import SimpleNamespace

import pytest
import torch
from torch import nn

from esft.errors import InputError
from esft.optimizer import adamw
from esft.optimizer.adamw import MasterAdamW
from esft.optimizer.masters import Split
from esft.optimizer.moments import BLOCK, signed, unsigned
from esft.parallel.ranks import Ranks
from esft.runs.config import TrainConfig

SIZES = (20.0, 0.01, 0.5)  # of three steps' gradients: the first alone is beyond the default clip


def master_of(optimizer: MasterAdamW, name: str) -> torch.Tensor:
    """Float32, in the parameter's shape."""
    p = optimizer.params[name]
    return optimizer.masters[name].read(slice(0, p.numel()), torch.empty(p.numel())).view(p.shape)


def gradients(*shape: int) -> list[torch.Tensor]:
    """One of each of ``SIZES``, as norm; exact in bfloat16, so that casting them changes nothing."""
    drawn = (torch.randn(*shape) for _ in SIZES)
    return [(size * g / g.norm()).bfloat16() for size, g in zip(SIZES, drawn, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"clip": 0.1}, {"weight_decay": 0.0}, {"weight_decay": 0.7}, {"beta1": 0.5}, {"beta2": 0.5}]
)
def test_parameters_move_as_float32_copies_of_them_under_plain_clipped_adamw(dtype: torch.dtype, settings: dict):
    config = TrainConfig(**settings)
    ours = {name: nn.Parameter(torch.randn(4, 3).to(dtype)) for name in ("a", "b")}
    theirs = {name: nn.Parameter(p.detach().float().clone()) for name, p in ours.items()}
    optimizer = MasterAdamW(ours.items(), config)
    plain = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    # Adam makes nothing of one factor on all gradients. That clipping touches some steps only shows in their ratio.
    for step, (a, b) in enumerate(zip(gradients(4, 3), gradients(4, 3), strict=True)):
        rate = 0.01 * (step + 1)
        for name, gradient in (("a", a), ("b", b)):
            ours[name].grad, theirs[name].grad = gradient.to(dtype), gradient.float()
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), config.clip)
        plain.param_groups[0]["lr"] = rate
        plain.step()
        assert optimizer.step(rate) == pytest.approx(expected.item(), rel=1e-6)
        assert all(p.grad is None for p in ours.values())
    state = optimizer.state()
    assert not any(tensor.requires_grad for tensor in state.values())
    for name, p in theirs.items():
        torch.testing.assert_close(master_of(optimizer, name), p.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(state[f"exp_avg/{name}"], plain.state[p]["exp_avg"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(state[f"exp_avg_sq/{name}"], plain.state[p]["exp_avg_sq"], rtol=1e-5, atol=1e-10)
        assert torch.equal(ours[name].detach(), master_of(optimizer, name).to(dtype))


def test_the_norm_is_that_of_all_gradients_before_they_are_clipped_to_the_largest():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = MasterAdamW([("first", first), ("second", second)], TrainConfig(clip=2.0, beta1=0.5))
    first.grad, second.grad = torch.tensor([6.0]), torch.tensor([8.0])
    norm = optimizer.step(0.1)
    assert type(norm) is float and norm == 10.0
    # Clipped to 2 the gradients are 1.2 and 1.6, and half of each enters its mean.
    state = optimizer.state()
    assert state["exp_avg/first"].item() == pytest.approx(0.6, rel=1e-5)
    assert state["exp_avg/second"].item() == pytest.approx(0.8, rel=1e-5)


def test_steps_too_small_for_bf16_add_up_in_the_master():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", weight)], TrainConfig(weight_decay=0.0))
    for _ in range(30):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-3)
    assert torch.allclose(master_of(optimizer, "w"), torch.full((8,), 0.97), atol=1e-4)
    assert torch.equal(weight.detach(), master_of(optimizer, "w").bfloat16())


@pytest.mark.parametrize("piece", [BLOCK, 3 * BLOCK, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_pieces_or_whole_masters_are_those_of_plain_adamw_bit_for_bit(monkeypatch, dtype: torch.dtype, piece: int):
    monkeypatch.setattr(adamw, "PIECE", piece)
    shapes = {"a": (7, 33, 5), "b": (3,), "c": (2, 256), "d": (1, 1)}  # before, at and behind the end of a piece
    ours = {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    theirs = {name: nn.Parameter(p.detach().float().clone()) for name, p in ours.items()}
    optimizer = MasterAdamW(ours.items(), TrainConfig(clip=float("inf")))
    plain = torch.optim.AdamW(theirs.values(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(12):
        for name, p in ours.items():
            p.grad = (torch.randn(p.shape) * 10.0 ** (step % 5 - 3)).to(dtype)
            theirs[name].grad = p.grad.float()
        plain.param_groups[0]["lr"] = rate = 1e-3 * (step + 1)
        plain.step()
        norm = torch.cat([p.grad.flatten() for p in ours.values()]).double().norm()
        assert optimizer.step(rate) == pytest.approx(norm.item(), rel=1e-6)
        for name, p in theirs.items():
            assert torch.equal(master_of(optimizer, name), p.detach())
            ties = p.detach().view(torch.int32) % (1 << 16) == 0x8000
            assert torch.equal(ours[name].detach()[~ties], p.detach().to(dtype)[~ties])


def test_as_many_tensors_as_fill_a_piece_are_stepped_at_once(monkeypatch):
    monkeypatch.setattr(adamw, "PIECE", 8)
    sizes, real = [], adamw.adamw
    monkeypatch.setattr(adamw, "adamw", lambda ps, *a, **k: sizes.append([len(p) for p in ps]) or real(ps, *a, **k))
    named = [(str(i), nn.Parameter(torch.ones(size))) for i, size in enumerate((4, 4, 4, 4, 9, 2))]
    optimizer = MasterAdamW(named, TrainConfig())
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step(0.1)
    assert sizes == [[4, 4], [4, 4], [8], [1, 2]]


def test_a_step_makes_nothing_of_the_size_of_a_tensor(monkeypatch):
    monkeypatch.setattr(adamw, "PIECE", 4 * BLOCK)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    small = nn.Parameter(torch.randn(2, BLOCK).bfloat16())
    small.grad = torch.randn_like(small)
    with Watch():
        MasterAdamW([("w", small)], TrainConfig()).step(1e-3)
    assert largest == 2 * small.numel() * 4  # the buffers, which hold no more than all that trains
    largest = 0
    for name in ("adamw", "adamw_8bit"):
        weight = nn.Parameter(torch.randn(64, 4 * BLOCK).bfloat16())
        optimizer = MasterAdamW([("w", weight)], TrainConfig(optimizer=name))
        for step in range(2):
            weight.grad = torch.randn_like(weight)
            if step:  # the first makes moments and buffers
                with Watch():
                    optimizer.step(1e-3)
            else:
                optimizer.step(1e-3)
    assert 0 < largest <= 8 * BLOCK * 4 * 4 < weight.nbytes


def test_moments_in_8_bits_are_adamws_with_both_rounded_after_every_step():
    config = TrainConfig(optimizer="adamw_8bit", clip=float("inf"))
    weight = nn.Parameter(torch.randn(3, 200, dtype=torch.float32))
    value = weight.detach().double().flatten()
    mean, square = torch.zeros(600).double(), torch.zeros(600).double()
    optimizer = MasterAdamW([("w", weight)], config)

    def rounded(values: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
        """The twin: to the nearest of the table, a block at a time."""
        blocks = []
        for block in values.split(BLOCK):
            scaled = (block / block.abs().max()).float().bfloat16().double()
            codes = torch.tensor(table, dtype=torch.float64)
            blocks.append(codes[(scaled[:, None] - codes).abs().argmin(dim=1)] * block.abs().max())
        return torch.cat(blocks)

    for step in range(1, 6):
        gradient = torch.randn(3, 200)
        weight.grad = gradient.clone()
        optimizer.step(1e-2)
        g = gradient.double().flatten()
        mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
        update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        value = value * (1 - 1e-2 * config.weight_decay) - 1e-2 * update
        torch.testing.assert_close(weight.detach().double().flatten(), value, rtol=1e-5, atol=1e-6)
        # From what the optimizer has: a value next to the middle of two codes may go to the other one in float64.
        moments = optimizer.moments["w"].read(slice(0, 600))
        for found, exact, table in zip(moments, (mean, square), (signed(), unsigned()), strict=True):
            assert ((found.double() - rounded(exact, table)).abs() < 1e-6 * exact.abs().max()).float().mean() > 0.98
            torch.testing.assert_close(found.double(), exact, rtol=0.5, atol=3e-7 * exact.abs().max().item())
        mean, square = (part.double() for part in moments)


def test_a_weight_whose_gradients_stop_does_not_run_away_with_moments_in_8_bits():
    weights = {name: nn.Parameter(torch.zeros(BLOCK)) for name in ("adamw", "adamw_8bit")}
    optimizers = {name: MasterAdamW([("w", w)], TrainConfig(optimizer=name)) for name, w in weights.items()}
    for step in range(20):
        for name, weight in weights.items():
            # Small ones beside a large one: their squares are below what 8 bits tell from zero.
            weight.grad = torch.full((BLOCK,), 1e-4) if step < 3 else torch.zeros(BLOCK)
            weight.grad[0] = 1.0
            optimizers[name].step(1e-3)
    assert (weights["adamw_8bit"].detach().abs() <= weights["adamw"].detach().abs().max() * 1.1).all()


def test_masters_are_those_of_the_parameters_dtypes():
    named = {"full": nn.Parameter(torch.ones(2)), "half": nn.Parameter(torch.ones(2, dtype=torch.float16))}
    named["brain"] = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterAdamW(named.items(), TrainConfig())
    assert optimizer.state()["master/full"].data_ptr() == named["full"].data_ptr()
    assert optimizer.state()["master/half"].dtype == torch.float32
    assert isinstance(optimizer.masters["brain"], Split)
    assert all(torch.equal(master_of(optimizer, name), torch.ones(2)) for name in named)


def test_a_parameter_that_lies_transposed_is_stepped_all_the_same():
    weight = nn.Parameter(torch.randn(4, 300).T)
    plain = nn.Parameter(weight.detach().clone().contiguous())
    optimizers = [MasterAdamW([("w", p)], TrainConfig(optimizer="adamw_8bit")) for p in (weight, plain)]
    gradient = torch.randn(300, 4)
    for p, optimizer in zip((weight, plain), optimizers, strict=True):
        p.grad = gradient.clone() if p is plain else gradient.T.contiguous().T
        optimizer.step(0.1)
    assert torch.equal(weight, plain)


def test_what_does_not_train_and_what_has_no_elements_is_passed_over():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    trained, empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0, 2))
    optimizer = MasterAdamW([("frozen", frozen), ("empty", empty), ("trained", trained)], TrainConfig())
    frozen.grad, trained.grad = torch.ones(2), torch.ones(2)
    assert optimizer.step(0.1) == pytest.approx(2**0.5)
    assert optimizer.state().keys() == {f"{key}/trained" for key in ("master", "step", "exp_avg", "exp_avg_sq")}
    assert torch.equal(frozen, torch.ones(2)) and not torch.equal(trained, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_without_a_gradient_stays_and_one_of_an_earlier_step_is_not_used_again(dtype: torch.dtype):
    still, moved = (nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
    optimizer = MasterAdamW([("still", still), ("moved", moved)], TrainConfig())
    moved.grad = torch.ones_like(moved)
    optimizer.step(0.1)
    assert torch.equal(still.detach(), torch.ones(2, dtype=dtype))
    assert "exp_avg/still" not in optimizer.state()
    after = moved.detach().clone()
    assert optimizer.step(0.1) == 0.0
    assert torch.equal(moved.detach(), after) and not torch.equal(after, torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("done", [0, 3])
def test_state_restores_the_same_course(dtype: torch.dtype, done: int, name: str):
    def run(optimizer: MasterAdamW, weight: nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = torch.randn(300, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.step(0.01)

    config = TrainConfig(optimizer=name)
    first = nn.Parameter(torch.ones(300, dtype=dtype))
    whole = MasterAdamW([("w", first)], config)
    run(whole, first, range(done))
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    before = first.detach().clone()
    run(whole, first, range(done, 6))
    second = nn.Parameter(torch.zeros(300, dtype=dtype))
    resumed = MasterAdamW([("w", second)], config)
    resumed.load_state(state)
    assert torch.equal(second.detach(), before)
    run(resumed, second, range(done, 6))
    assert torch.equal(first, second)
    assert whole.state().keys() == resumed.state().keys()
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[key]), key


def test_a_state_takes_the_place_of_all_that_was_stepped_before():
    def made() -> MasterAdamW:
        return MasterAdamW([(name, nn.Parameter(torch.ones(2))) for name in ("a", "b")], TrainConfig())

    early, late = made(), made()
    early.params["a"].grad = torch.ones(2)
    early.step(0.1)
    state = {name: tensor.clone() for name, tensor in early.state().items()}
    for _ in range(3):
        for p in late.params.values():
            p.grad = torch.ones(2)
        late.step(0.1)
    late.load_state(state)
    assert late.steps == {"a": 1} and late.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in late.state().items())
    late.params["a"].grad = torch.ones(2)
    late.step(0.1)  # what was loaded stays as it is
    assert all(torch.equal(tensor, state[name]) for name, tensor in early.state().items())


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_what_a_loaded_state_has_no_moments_of_begins_anew(name: str):
    fresh, used = (nn.Parameter(torch.ones(300)) for _ in range(2))
    optimizers = [MasterAdamW([("w", p)], TrainConfig(optimizer=name)) for p in (fresh, used)]
    before = {key: tensor.clone() for key, tensor in optimizers[0].state().items()}
    used.grad = torch.randn(300)
    optimizers[1].step(0.1)
    optimizers[1].load_state(before)
    for p, optimizer in zip((fresh, used), optimizers, strict=True):
        p.grad = torch.linspace(-1, 1, 300)
        optimizer.step(0.1)
    assert torch.equal(fresh, used)
    assert all(torch.equal(tensor, optimizers[1].state()[key]) for key, tensor in optimizers[0].state().items())


def test_a_parameter_whose_first_gradient_comes_late_takes_its_own_first_step():
    early, late = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = MasterAdamW([("early", early), ("late", late)], TrainConfig(weight_decay=0.0))
    for step in range(3):
        early.grad = torch.ones(4)
        late.grad = torch.ones(4) if step == 2 else None
        optimizer.step(0.01)
    assert optimizer.steps == {"early": 3, "late": 1}
    # A first step is of the rate's length, as both moments are then corrected by what they lack.
    torch.testing.assert_close(late.detach(), torch.full((4,), 0.99))


def test_a_state_with_whole_masters_of_bf16_is_gone_on_with():
    weight, values = nn.Parameter(torch.ones(5, dtype=torch.bfloat16)), torch.randn(5)
    optimizer = MasterAdamW([("w", weight)], TrainConfig())
    state = {"master/w": values, "step/w": torch.tensor(4.0), "exp_avg/w": torch.ones(5), "exp_avg_sq/w": torch.ones(5)}
    optimizer.load_state(state)
    assert torch.equal(master_of(optimizer, "w"), values) and torch.equal(weight.detach(), values.bfloat16())
    assert optimizer.state()["step/w"] == 4.0 and optimizer.state().keys() - state.keys() == {"weight/w", "low_bits/w"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("low_bits/a"), "tensor low_bits/a is missing"),
        (lambda s: s.pop("exp_avg_codes/a"), "tensor exp_avg_codes/a is missing"),
        (lambda s: s.update({"exp_avg/a": torch.zeros(2, 3)}), "tensor exp_avg/a is none that trains"),
        (lambda s: s.update({"weight/a": torch.zeros(2, 3)}), r"weight/a is float32 \(2, 3\), not bfloat16 \(2, 3\)"),
        (lambda s: s.update({"exp_avg_sq_codes/a": torch.zeros(6)}), r"codes/a is float32 \(6,\), not uint8 \(6,\)"),
        (lambda s: s.update({"exp_avg_absmax/a": torch.zeros(2)}), r"absmax/a is float32 \(2,\), not float32 \(1,\)"),
        (lambda s: s["exp_avg_sq_absmax/a"].fill_(torch.inf), "exp_avg_sq_absmax/a holds values that are not finite"),
        (lambda s: s["exp_avg_absmax/a"].fill_(-1), "exp_avg_absmax/a holds values below zero"),
        (lambda s: s["exp_avg_sq_absmax/a"].fill_(-1), "exp_avg_sq_absmax/a holds values below zero"),
        (lambda s: s["weight/a"][0, 2].fill_(torch.nan), "weight/a holds values that are not finite"),
    ],
)
def test_a_state_in_fewer_bits_that_is_not_right_is_named_and_changes_nothing(change, message: str):
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("a", weight)], TrainConfig(optimizer="adamw_8bit"))
    weight.grad = torch.ones_like(weight)
    optimizer.step(0.1)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    fresh = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    loading = MasterAdamW([("a", fresh)], TrainConfig(optimizer="adamw_8bit"))
    change(state)
    with pytest.raises(InputError, match=message):
        loading.load_state(state)
    assert not fresh.any() and not loading.moments


def test_without_parameters_there_is_nothing_to_step():
    optimizer = MasterAdamW([("empty", nn.Parameter(torch.ones(0, 4)))], TrainConfig(optimizer="adamw_8bit"))
    assert optimizer.step(0.1) == 0.0 and optimizer.state() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("master/b"), "tensor master/b is missing"),
        (lambda s: s.pop("exp_avg/a"), "tensor exp_avg/a is missing"),
        (lambda s: s.pop("step/a"), "tensor step/a is missing"),
        (lambda s: s.update({"master/c": torch.zeros(1)}), "tensor master/c is none that trains"),
        (lambda s: s.update({"exp_avg/c": torch.zeros(1)}), "tensor exp_avg/c is none that trains"),
        (lambda s: s.update({"master/a": torch.zeros(1)}), r"master/a is float32 \(1,\), not float32 \(2, 3\)"),
        (lambda s: s.update({"exp_avg/a": torch.zeros(1, 3)}), r"exp_avg/a is float32 \(1, 3\), not float32"),
        (lambda s: s.update({"exp_avg_sq/a": torch.zeros(3, 2)}), r"exp_avg_sq/a is float32 \(3, 2\), not"),
        (lambda s: s.update({"step/a": torch.zeros(1)}), r"step/a is float32 \(1,\), not float32 \(\)"),
        (
            lambda s: s.update({"master/a": torch.zeros(2, 3).half()}),
            r"master/a is float16 \(2, 3\), not",
        ),
        (lambda s: s["exp_avg_sq/a"][1].fill_(-1e-30), "exp_avg_sq/a holds values below zero"),
        (lambda s: s["step/a"].fill_(-1), "step/a holds values below zero"),
        (lambda s: s["exp_avg/a"][1].fill_(torch.nan), "exp_avg/a holds values that are not finite"),
        (lambda s: s["master/b"][3:].fill_(torch.inf), "master/b holds values that are not finite"),
    ],
)
def test_a_state_that_is_none_of_these_parameters_is_named_and_changes_nothing(change, message: str):
    def made() -> MasterAdamW:
        named = {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(4))}
        return MasterAdamW(named.items(), TrainConfig())

    trained = made()
    trained.params["a"].grad = torch.ones(2, 3)
    trained.step(0.1)
    state = {name: tensor.clone() for name, tensor in trained.state().items()}
    assert state.keys() == {"master/a", "master/b", "step/a", "exp_avg/a", "exp_avg_sq/a"}
    made().load_state(state)
    fresh = made()
    change(state)
    with pytest.raises(InputError, match=message):
        fresh.load_state(state)
    assert all(torch.equal(p, torch.ones_like(p)) for p in fresh.params.values()) and not fresh.moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_is_no_longer_finite_is_named(dtype: torch.dtype):
    named = [(name, nn.Parameter(torch.ones(3, dtype=dtype))) for name in ("a", "b")]
    optimizer = MasterAdamW(named, TrainConfig())
    assert optimizer.overflowed() is None
    for value in (torch.nan, torch.inf):
        named[1][1].data[2] = value
        assert optimizer.overflowed() == "b"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_gradient_whose_norm_is_no_number_changes_nothing(value: float):
    named = [(name, nn.Parameter(torch.ones(3))) for name in ("a", "b")]
    optimizer = MasterAdamW(named, TrainConfig())
    for _, p in named:
        p.grad = torch.ones(3)
    assert optimizer.gradients_are_finite()
    optimizer.step(0.1)
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    named[0][1].grad, named[1][1].grad = torch.ones(3), torch.tensor([1.0, value, value])
    assert optimizer.gradients_are_finite() == (value == 3e38)  # each is a number, their norm is not
    assert not torch.tensor(optimizer.step(0.1)).isfinite()
    assert optimizer.state().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in optimizer.state().items())


def test_what_lies_on_two_devices_is_not_stepped_together():
    optimizer = MasterAdamW([], TrainConfig())
    places = {"a": "cuda:0", "b": "cuda:0", "c": "cuda:1", "d": "cuda:0"}
    optimizer.params = {
        name: SimpleNamespace(grad=True, numel=lambda: 4, device=torch.device(place)) for name, place in places.items()
    }
    assert [[name for name, _ in group] for group in optimizer._groups()] == [["a", "b"], ["c"], ["d"]]


def test_the_norm_counts_what_is_dealt_out_over_all_ranks_and_the_rest_once():
    class Two(Ranks):
        size = 2

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + 5.0**2  # of the other rank's part

    named = [("alike", nn.Parameter(torch.zeros(2))), ("dealt", nn.Parameter(torch.zeros(1, 2)))]
    optimizer = MasterAdamW(named, TrainConfig(), ["dealt", "of the other alone"], Two())
    named[0][1].grad, named[1][1].grad = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 4.0]])
    assert optimizer.step(0.1) == pytest.approx((1 + 4 + 4 + 16 + 25) ** 0.5)


def test_moments_in_8_bits_are_not_dealt_out_where_a_block_would_be_of_two_experts():
    whole, half = (nn.Parameter(torch.zeros(3, rows, BLOCK // 2)) for rows in (2, 1))
    config = TrainConfig(optimizer="adamw_8bit")
    MasterAdamW([("a", whole), ("b", half)], config, ["a"])
    with pytest.raises(InputError, match=f"^b: an expert has {BLOCK // 2} elements, not a multiple of {BLOCK}: "):
        MasterAdamW([("a", whole), ("b", half)], config, ["a", "b"])


def test_on_a_gpu_pieces_are_larger_than_their_launches():
    assert adamw._piece(torch.device("cpu")) == adamw.PIECE
    assert adamw._piece(torch.device("cuda")) == adamw.GPU_PIECE >= 8 * adamw.PIECE
    assert adamw.GPU_PIECE % BLOCK == 0  # a piece starts with a block of moments
