import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import esft
from esft.optimizer.adamw import MasterAdamW
from esft.planning.plan import BASE, FORMATS, ROW_SHARE, _assumed, plan
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.swapping.load_state import is_pool
from esft.training.methods import METHODS, Source
from esft_kernels.formats.resolve import resolve_format
from tests.esft import zoo
from tests.esft.checkpoint.files import rewrite_json
from tests.esft.models import save_tiny, tiny_model

SELECTION = ExpertSelection({1: [2, 7], 2: [0]})


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(dtype=torch.bfloat16, hidden_size=64, moe_intermediate_size=64)
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(tmp_path)
    return str(tmp_path)


def config(**more) -> TrainConfig:
    return TrainConfig(**({"batch_size": 2} | more))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(
    ("method", "selection"),
    [
        ("esft", SELECTION),
        ("esft", ExpertSelection({1: [3]}, shared_experts=True)),
        ("esft", ExpertSelection({}, non_expert_modules=True)),
        ("full", None),
        ("lora", None),
    ],
    ids=str,
)
def test_parameters_weights_and_state_are_those_of_the_training(folder, method: str, selection, optimizer: str):
    if method == "lora":
        pytest.importorskip("peft")
    settings = config(method=method, optimizer=optimizer)
    found = plan(folder, selection, settings, tokens=64)
    model = tiny_model(dtype=torch.bfloat16, hidden_size=64, moe_intermediate_size=64)
    total, size = sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters())
    model.save_pretrained(folder)
    trained, _ = METHODS[method].prepare(Source(folder), settings, selection)
    parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    assert found.parameters == total
    assert found.trained_parameters == sum(p.numel() for p in parameters.values())
    assert found.gradients == sum(p.nbytes for p in parameters.values())
    weights = found.trained_experts + found.frozen_experts + found.other_weights
    assert weights == size + (found.gradients if method == "lora" else 0)
    optimizer_ = MasterAdamW(parameters.items(), settings)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer_.step(1e-3)
    own = {p.untyped_storage().data_ptr() for p in parameters.values()}
    state = {n: t for n, t in optimizer_.state().items() if t.untyped_storage().data_ptr() not in own}
    beside = sum(t.nbytes for n, t in state.items() if n.startswith(("master/", "low_bits/")))
    moments = sum(t.nbytes for n, t in state.items() if n.startswith("exp_avg"))
    assert (found.masters, found.moments) == (beside, moments)
    assert found.base == BASE == 600 * 2**20
    assert found.peak == BASE + weights + beside + moments + found.step
    assert found.step >= max(found.gradients, found.activations)
    assert found.stored == (size if method == "full" else found.gradients)


def test_frozen_experts_are_counted_in_their_format_and_nothing_else_changes(folder):
    plans = {name: plan(folder, SELECTION, config(), frozen=name, tokens=64) for name in FORMATS}
    g, d, f, frozen = 128, 64, 64, 8 + 8 - SELECTION.num_experts
    assert plans["bf16"].frozen_experts == 2 * frozen * (g * d + d * f)
    for name in FORMATS[1:]:
        kind = resolve_format(name)
        bytes_ = sum(
            kind.nbytes(8 - len(ids), *size) for ids in SELECTION.experts.values() for size in ((g, d), (d, f))
        )
        assert plans[name].frozen_experts == bytes_
    same = {name: {**vars(p), "frozen": 0, "frozen_experts": 0, "peak": 0, "step": 0} for name, p in plans.items()}
    assert all(each == same["bf16"] for each in same.values())
    assert plans["nf4"].peak < plans["int8"].peak < plans["bf16"].peak
    assert plan(folder, SELECTION, config(), tokens=64) == plans["bf16"]


@pytest.mark.parametrize("selection", [SELECTION, ExpertSelection({1: [3]}, shared_experts=True)], ids=["", "shared"])
@pytest.mark.parametrize("linear", ["int8", "nf4"])
def test_frozen_linear_layers_are_counted_in_their_format(linear, selection, tmp_path):
    base = save_tiny(tmp_path)
    plain, small = (plan(str(base), selection, config(frozen_linear=kind), tokens=64) for kind in ("bf16", linear))
    model = esft.load(str(base), selection, frozen_linear=linear)
    beside = sum(p.nbytes for name, p in model.named_parameters() if not is_pool(name))
    assert small.other_weights == beside < plain.other_weights
    assert small.frozen_experts == plain.frozen_experts and small.peak < plain.peak
    assert small.step >= plain.step and small.frozen_linear == linear


def test_a_frozen_matrix_is_unpacked_into_twice_its_room_beside_all_that_a_step_takes(folder):
    plain, packed = (plan(folder, SELECTION, config(), frozen=name, tokens=1024) for name in ("bf16", "int8"))
    assert packed.step - plain.step == 2 * 128 * 64 * 2


def test_biases_stay_as_they_are_beside_experts_in_a_format(tmp_path):
    model = zoo.tiny("gpt_oss").bfloat16()
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(tmp_path)
    experts = model.model.layers[0].mlp.experts
    sizes = [tuple(matrix.mT.shape[1:]) for matrix in (experts.gate_up_proj, experts.down_proj)]
    biases = experts.gate_up_proj_bias[0].nbytes + experts.down_proj_bias[0].nbytes
    found = plan(str(tmp_path), ExpertSelection({0: [1, 2, 3]}), config(), frozen="int8", tokens=64)
    kind, left = resolve_format("int8"), (8 - 3, 8)
    assert found.frozen_experts == sum(kind.nbytes(n, *size) for n in left for size in sizes) + sum(left) * biases


def test_an_update_has_buffers_for_gradient_master_and_moments_and_can_be_the_most_of_a_step(folder):
    found = plan(folder, config=config(method="full"), tokens=2)
    assert found.step == found.trained_parameters * (2 + 4 * 4)


def test_gradients_wait_where_a_batch_goes_through_in_parts_and_only_there(folder):
    at_once = plan(folder, None, config(method="full"), tokens=1024)
    in_parts = plan(folder, None, config(method="full", batch_size=4, micro_batch_size=2), tokens=1024)
    assert (at_once.records, at_once.tokens) == (in_parts.records, in_parts.tokens) == (2, 1024)
    assert in_parts.step - at_once.step > 0.3 * at_once.gradients


def test_the_base_that_a_training_is_held_to_is_kept_beside_it(folder):
    alone, held = (plan(folder, SELECTION, config(kl_weight=weight), tokens=64) for weight in (0.0, 0.5))
    assert held.peak - alone.peak == held.other_weights - alone.other_weights == alone.gradients > 0


def test_without_settings_one_record_is_planned_with_and_lora_as_it_is_set(folder):
    assert plan(folder, SELECTION, tokens=64).records == 1
    pytest.importorskip("peft")
    few, many = (plan(folder, None, config(method="lora", lora_rank=rank), tokens=8) for rank in (4, 8))
    assert many.trained_parameters == 2 * few.trained_parameters


def test_without_a_selection_the_number_of_experts_is_assumed_and_said(folder):
    assert plan(folder, config=config(), tokens=64).assumed == 1  # 5 of 64
    assert plan(folder, config=config(), tokens=64, top_p=0.8).assumed == 2
    many = plan(folder, config=config(), tokens=64, experts=5)
    assert many.assumed == 5
    assert many.trained_parameters == 2 * 5 * 3 * 64 * 64
    assert plan(folder, SELECTION, config(), tokens=64).assumed is None
    assert 0 < ROW_SHARE < 1


def test_less_memory_is_planned_where_the_training_takes_less(tmp_path):
    model = tiny_model(hidden_size=64, moe_intermediate_size=64, num_hidden_layers=8)
    model.config.save_pretrained(tmp_path)
    folder = str(tmp_path)

    def taken(tokens: int = 1024, **more):
        return plan(folder, SELECTION, config(**({"batch_size": 8} | more)), tokens=tokens)

    usual = taken()
    assert taken(recompute="layers").activations < taken(recompute="frozen").activations < usual.activations
    assert taken(recompute="layers").step < usual.step
    assert taken(512).step < usual.step
    assert taken(micro_batch_size=4).step > usual.step  # as many tokens, and the gradients of others wait


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"frozen": "nf4", "config": config(method="full")}, "^frozen nf4 goes with the method esft, not with full"),
        ({"selection": SELECTION, "config": config(method="full")}, "^method full takes no expert selection"),
        ({"experts": 2, "config": config(method="lora")}, "^method lora takes no expert selection"),
        ({"experts": 9}, "^9 experts a layer: the model's layers have 8"),
        ({"selection": ExpertSelection({5: [1]})}, "^selection names layer 5"),
        ({"selection": ExpertSelection({})}, "^the expert selection is empty"),
        ({"tokens": 1}, "^1 tokens cannot be those of 2 records"),
        ({"frozen": "nf8"}, "^frozen must be one of auto, bf16, .*, got 'nf8'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(folder, how: dict, message: str):
    with pytest.raises(esft.InputError, match=message):
        plan(folder, **({"config": config()} | how))


def test_experts_that_a_checkpoint_has_in_few_bits_are_planned_so_where_they_stay_so(folder):
    shipped = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    rewrite_json(Path(folder) / "config.json", lambda whole: whole.update(quantization_config=shipped))
    found = plan(folder, SELECTION, config(), tokens=64)
    assert found.frozen == "fp8" and found == plan(folder, SELECTION, config(), frozen="fp8", tokens=64)
    assert plan(folder, SELECTION, config(), frozen="bf16", tokens=64).frozen_experts > found.frozen_experts
    assert plan(folder, None, config(method="full"), tokens=64).frozen == "bf16"


def test_a_plan_is_numbers_and_words_that_json_has(folder):
    found = plan(folder, SELECTION, config(), tokens=64)
    assert json.loads(json.dumps(vars(found))) == vars(found)


def test_of_layers_with_unlike_numbers_of_experts_each_trains_as_many_as_it_has():
    layers = [SimpleNamespace(index=index, experts=experts) for index, experts in ((1, 8), (3, 64), (5, 16))]
    selection, number = _assumed(SimpleNamespace(layers=layers), 0.2, 12)
    assert number == 12 and {layer: len(ids) for layer, ids in selection.experts.items()} == {1: 8, 3: 12, 5: 12}
    assert _assumed(SimpleNamespace(layers=layers), 0.2, None)[1] == 5  # of the most, 64
    assert _assumed(SimpleNamespace(layers=layers), 0.2, 64)[1] == 64
    with pytest.raises(esft.InputError, match="^65 experts a layer: the model's layers have 64$"):
        _assumed(SimpleNamespace(layers=layers), 0.2, 65)


def test_a_configuration_that_has_changed_is_planned_anew(folder):
    before = plan(folder, SELECTION, config(), tokens=64)
    rewrite_json(Path(folder) / "config.json", lambda values: values.update(hidden_size=128))
    after = plan(folder, SELECTION, config(), tokens=64)
    assert after.parameters > before.parameters and after.step > before.step
