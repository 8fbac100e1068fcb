import pytest
import torch

from esft.experts.model_state import MixedAdapters
from esft.experts.pooled_experts import PROJECTIONS, Experts
from esft.parallel.experts import Deal
from esft.selection import ExpertSelection
from esft_kernels.activation import Activation
from esft_kernels.formats.resolve import FORMATS
from tests.esft.experts.test_stock_layout import LAYOUTS, Flagged
from tests.esft.experts.test_stock_layout import batch as batch_for_flagged


def made(weights: list[torch.Tensor], flags: dict, trained: tuple[int, ...], frozen: str = "bf16") -> Experts:
    """Experts of stacked weights that lie as the flags of ``Flagged`` say."""
    biases = dict(zip(("gate_up_bias", "down_bias"), weights[2:], strict=False))
    layout = {"transposed": flags["transposed"], "interleaved": flags["interleaved"]}
    return Experts(
        *weights[:2], trained, activation=Activation(gated=flags["gated"]), frozen=frozen, **layout, **biases
    )


def test_stacked_gives_the_weights_back_in_expert_order():
    gate_up, down = torch.randn(5, 6, 4), torch.randn(5, 4, 3)
    experts = Experts(gate_up, down, [3, 0])
    assert torch.equal(experts.trained_down_proj, down[[3, 0]])
    assert torch.equal(experts.frozen_down_proj, down[[1, 2, 4]])
    assert all(torch.equal(a, b) for a, b in zip(experts.stacked(), (gate_up, down), strict=True))


@pytest.mark.parametrize("flags", LAYOUTS)
@pytest.mark.parametrize("trained", [[], [3, 0], [4, 3, 2, 1, 0]])
def test_experts_compute_and_hold_what_they_were_given_whatever_the_layout(flags: dict, trained: list[int]):
    stock = Flagged(**flags)
    weights = [p.detach().clone() for p in stock.parameters()]
    experts = made(weights, flags, tuple(trained))
    args = batch_for_flagged()
    torch.testing.assert_close(experts(*args), stock(*args), atol=1e-12, rtol=1e-12)
    pools = experts.pools
    assert (experts.num_experts, pools.num_trained, pools.num_experts) == (5, len(trained), 5)
    assert pools.activation == Activation(gated=flags["gated"]) and pools.interleaved == flags["interleaved"]
    for whole, given in zip(experts.stacked(), weights, strict=True):
        assert torch.equal(whole, given) and not whole.requires_grad
    for e in range(5):
        parts = experts.weights_of(e)
        assert all(torch.equal(part, given[e]) for part, given in zip(parts, weights, strict=True))
        assert not any(part.requires_grad for part in parts)
        parts[1].fill_(e)  # a view: what is written there is the experts'
    assert experts.stacked()[1].flatten(1).unique(dim=1).flatten().tolist() == [0, 1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), weights, strict=True))  # copies, so left alone


@pytest.mark.parametrize("flags", [LAYOUTS[0], LAYOUTS[7], LAYOUTS[10]])
@pytest.mark.parametrize("frozen", FORMATS)
def test_frozen_experts_in_a_format_are_what_that_keeps_of_their_matrices_and_no_others_are(flags: dict, frozen: str):
    kind, weights = FORMATS[frozen], [p.detach() for p in Flagged(**flags).parameters()]
    kept = [weight.clone() for weight in weights]
    for expert in (1, 2, 4):
        for stack in kept[:2]:
            matrix = stack[expert].mT if flags["transposed"] else stack[expert]
            parts = [part[0] for part in kind.quantize(matrix[None])]
            matrix.copy_(kind.decode(parts, *matrix.shape, matrix.new_empty(kind.buffer_size(*matrix.shape))))
    experts, plain = made(weights, flags, (3, 0), frozen), made(kept, flags, (3, 0))
    assert [experts.is_packed(expert) for expert in range(5)] == [False, True, True, False, True]
    assert not any(map(plain.is_packed, range(5)))
    assert not torch.equal(kept[1], weights[1])
    args = batch_for_flagged()
    torch.testing.assert_close(experts(*args), plain(*args), atol=1e-12, rtol=1e-12)
    for whole, expected in zip(experts.stacked(), kept, strict=True):
        assert torch.equal(whole, expected)
    for expert in range(5):
        for part, expected in zip(experts.weights_of(expert), kept, strict=True):
            assert torch.equal(part, expected[expert])


def test_what_is_in_a_format_are_integers_of_its_bits_which_another_dtype_of_the_model_leaves_alone():
    experts = Experts(torch.randn(4, 6, 8), torch.randn(4, 8, 3), [2], frozen="fp8")
    before = {name: p.clone() for name, p in experts.named_parameters() if name.startswith("frozen")}
    assert {name: p.dtype for name, p in before.items()} == {
        f"frozen_{projection}_{part}": dtype
        for projection in PROJECTIONS[:2]
        for part, dtype in (("weight", torch.uint8), ("scale_inv", torch.int32))
    }
    experts.to(torch.bfloat16)
    assert experts.trained_down_proj.dtype == torch.bfloat16
    assert all(torch.equal(p, before[name]) for name, p in experts.named_parameters() if name in before)
    assert repr(experts) == "Experts(num_experts=4, trained=[2], backend='auto', frozen='fp8')"


@pytest.mark.parametrize("frozen", ["bf16", "nf4", "fp8"])
def test_weights_that_are_written_take_the_place_of_one_experts_in_its_pool(frozen: str):
    flags = {"gated": True, "transposed": True, "interleaved": False, "biased": True}
    old, new, both = ([p.detach() for p in Flagged(**flags).parameters()] for _ in range(3))
    for kept, given, changed in zip(both, old, new, strict=True):
        kept.copy_(given)
        kept[[1, 3]] = changed[[1, 3]]
    experts = made(old, flags, (3, 0), frozen)
    for expert in (1, 3):
        experts.write(expert, [weight[expert] for weight in new])
    wanted = made(both, flags, (3, 0), frozen).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in experts.state_dict().items())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trained", [[], [3, 0], [3]])
def test_both_pools_are_parameters_of_which_the_trained_one_trains_where_it_holds_something(biased: bool, trained):
    biases = {"gate_up_bias": torch.randn(4, 6), "down_bias": torch.randn(4, 4)} if biased else {}
    experts = Experts(torch.randn(4, 6, 4), torch.randn(4, 4, 3), trained, **biases)
    names = PROJECTIONS if biased else PROJECTIONS[:2]
    expected = {f"trained_{n}": bool(trained) for n in names} | {f"frozen_{n}": False for n in names}
    assert {n: p.requires_grad for n, p in experts.named_parameters()} == expected
    assert experts.state_dict().keys() == expected.keys()  # the positions follow from the ids, and are not saved
    if not biased:
        assert experts.trained_gate_up_proj_bias is None and experts.frozen_down_proj_bias is None
    assert experts.position.tolist() == {0: [0, 1, 2, 3], 1: [1, 2, 3, 0], 2: [1, 2, 3, 0]}[len(trained)]
    assert experts.position.dtype == torch.int64


def test_what_is_not_said_has_its_usual_meaning():
    experts = Experts(torch.randn(4, 6, 4), torch.randn(4, 4, 3))
    assert (experts.trained, experts.backend, experts.recompute) == ((), "auto", "none")
    assert (experts.activation, experts.interleaved, experts.transposed) == (Activation(), False, False)
    assert Experts(torch.randn(4, 6, 4, device="meta"), torch.randn(4, 4, 3, device="meta")).position.is_meta
    assert repr(Experts(torch.randn(4, 6, 4), torch.randn(4, 4, 3), [2, 0], "cpu")) == (
        "Experts(num_experts=4, trained=[2, 0], backend='cpu')"
    )


def test_backend_and_recompute_get_to_the_kernels():
    args = torch.randn(2, 4), torch.tensor([[0], [1]]), torch.rand(2, 1)
    with pytest.raises(ValueError, match="backend must be one of .*'gpu'"):
        Experts(torch.randn(4, 6, 4), torch.randn(4, 4, 3), [1], "gpu")(*args)
    with pytest.raises(ValueError, match="recompute must be one of .*'all'"):
        Experts(torch.randn(4, 6, 4), torch.randn(4, 4, 3), [1], "auto", "all")(*args)


@pytest.mark.parametrize(("of_x", "of_weights"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_experts_compute_in_the_dtype_of_their_weights_and_return_that_of_their_input(of_x, of_weights):
    experts = Experts(torch.randn(4, 6, 4).to(of_weights), torch.randn(4, 4, 3).to(of_weights), [2])
    x, index, weights = torch.randn(3, 4).to(of_x), torch.tensor([[0, 2], [2, 1], [1, 3]]), torch.rand(3, 2)
    out = experts(x, index, weights)
    assert out.dtype == of_x
    assert torch.equal(out, experts(x.to(of_weights), index, weights).to(of_x))


def test_rows_of_two_pools_are_put_in_order_as_a_tensor_of_their_own():
    experts = Experts(torch.randn(4, 6, 4), torch.randn(4, 4, 3), [3, 0])
    trained, frozen = torch.tensor([[3.0], [0.0]]).half(), torch.tensor([[1.0], [2.0]]).half()
    whole = experts.in_order(trained, frozen)
    assert whole.dtype == torch.float16 and whole.tolist() == [[0], [1], [2], [3]]
    trained.zero_()
    assert whole.tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize("frozen", ["bf16", "int8"])
def test_adapters_stand_one_after_the_other_and_the_base_stays(frozen: str):
    weights = torch.randn(4, 6, 8), torch.randn(4, 8, 3)
    experts = Experts(*weights, frozen=frozen)
    base, mixed = experts.stacked(), MixedAdapters({"a": ExpertSelection({}), "b": ExpertSelection({})})
    experts.hold(mixed, [[3, 0], [3]])
    assert experts.positions.tolist() == [[3, 4, 5, 6], [1, 4, 5, 0], [3, 4, 5, 2]]
    assert (experts.trained, experts.num_frozen, experts.num_experts) == ((3, 0, 3), 4, 4)
    assert experts.trained_down_proj.shape == (3, 8, 3) and experts.trained_down_proj.requires_grad
    for number, value in ((1, 1.0), (2, 2.0)):
        experts.show(number)
        assert experts.position.tolist() == experts.place == experts.positions[number].tolist()
        experts.write(3, [torch.full((6, 8), value), torch.full((8, 3), value)])
    experts.show(1)
    experts.write(0, [torch.full((6, 8), 3.0), torch.full((8, 3), 3.0)])
    for found, of_base in zip(experts.stacked(), base, strict=True):
        assert torch.equal(found[1:3], of_base[1:3]) and (found[0] == 3).all() and (found[3] == 1).all()
    assert experts.trained_down_proj[:, 0, 0].tolist() == [1, 3, 2]
    experts.show(0)
    assert all(torch.equal(found, of_base) for found, of_base in zip(experts.stacked(), base, strict=True))
    mixed.running = torch.tensor([0, 2])
    assert experts.adapters_of(6).tolist() == [0, 0, 0, 2, 2, 2]
    experts.hold(None, [])
    assert experts.place == [0, 1, 2, 3] and experts.adapters_of(6) is None
    assert experts.trained_down_proj.shape == (0, 8, 3) and not experts.trained_down_proj.requires_grad


@pytest.mark.parametrize("frozen", ["bf16", "int8"])
def test_of_dealt_experts_a_rank_has_its_own_and_asks_for_gradients_where_another_trains(frozen: str):
    weights = torch.randn(5, 6, 8), torch.randn(5, 8, 3)
    held = ((3, 0, 2), (1, 4))
    ranks = [Experts(*weights, [3], frozen=frozen, deal=Deal(rank, ((3,), ()), ((0, 2), (1, 4)))) for rank in (0, 1)]
    whole = Experts(*weights, [3], frozen=frozen)
    assert [(each.trained, each.num_held, each.num_experts) for each in ranks] == [((3,), 3, 5), ((), 2, 5)]
    for own, experts in zip(held, ranks, strict=True):
        assert experts.trained_gate_up_proj.requires_grad and experts.trained_down_proj.requires_grad
        assert [expert for expert in range(5) if experts.holds(expert)] == sorted(own)
        packed = [expert for expert in sorted(own) if expert != 3] if frozen == "int8" else []
        assert [expert for expert in range(5) if experts.is_packed(expert)] == packed
        before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
        for expert in range(5):
            for found, wanted in zip(experts.weights_of(expert), whole.weights_of(expert), strict=True):
                assert found.is_meta == (expert not in own) and (found.shape, found.dtype) == (
                    wanted.shape,
                    wanted.dtype,
                )
                assert found.is_meta or torch.equal(found, wanted)
            if expert not in own:
                experts.write(expert, [torch.zeros(6, 8), torch.zeros(8, 3)])
        assert all(torch.equal(tensor, before[name]) for name, tensor in experts.state_dict().items())


@pytest.mark.parametrize("trained", [[4], [-1], [1, 1]])
def test_impossible_trained_experts_are_refused(trained: list[int]):
    with pytest.raises(ValueError, match="trained experts"):
        Experts(torch.randn(4, 6, 4), torch.randn(4, 4, 3), trained)
