"""Models that transformers has spread over ranks, swapped: what a single process makes of the same model."""

import gc
import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import esft
from esft.data.examples import Example
from esft.errors import InputError
from esft.evaluation.answers import answer
from esft.experts.model_state import swapped_state
from esft.experts.moe_layers import dealt_parameters, is_apart, moe_layers
from esft.parallel.join import joined
from esft.selection import ExpertSelection
from esft.swapping import spread_model
from esft.training.steps import Steps
from tests.esft import zoo
from tests.esft.models import FAMILIES, record, save_tiny, tiny_model, tiny_tokenizer
from tests.esft.parallel.jobs import job
from tests.esft.small_runs import Recorded, settings

steps_module = importlib.import_module("esft.training.steps")

# Of the first of these layers one rank of two trains nothing, nor do three of four; of the others some of four.
SELECTION = ExpertSelection({1: [6], 2: [2, 7, 0]})
# Name -> family, how transformers spreads it, and what the frozen experts are kept in.
SPREAD = {
    "by two": ("qwen3_moe", {"fsdp_size": 2, "ep_size": 2}, "bf16"),
    "biased": ("gpt_oss", {"fsdp_size": 2, "ep_size": 2}, "int8"),
    "by four": ("deepseek_v2", {"fsdp_size": 4, "ep_size": 4}, "bf16"),
    "two copies": ("qwen3_moe", {"fsdp_size": 4, "ep_size": 2}, "bf16"),
    "replicated": ("mixtral", {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2}, "bf16"),
}
SIZES = {name: how["fsdp_size"] * how.get("dp_replicate_size", 1) for name, (_, how, _) in SPREAD.items()}
# Three for four ranks leave one without any.
ROWS = [Example(ids, ids) for ids in ([*range(5, 13)], [*range(40, 47)], [*range(20, 31)])]
ADAPTER = Path("adapter.safetensors")


def selection_of(family: str) -> ExpertSelection:
    return SELECTION if family in FAMILIES else ExpertSelection({0: [3], 1: [0, 2, 1]})


def own_bytes(model: nn.Module) -> int:
    return sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in model.parameters())


def used(model: nn.Module, base: Path, name: str, ranks, out: Path) -> dict:
    """A swapped model saved, trained for two steps, and asked; what every rank has of it beside ``out``."""
    frozen = SPREAD[name][2]
    esft.swap(model, selection_of(SPREAD[name][0]), frozen=frozen, ranks=ranks)
    found: dict = {"bytes": [own_bytes(model)]}
    esft.save_adapter(model, out / "swapped")
    if frozen == "bf16":
        model.save_pretrained(out / "stock")
    Recorded.kept, Recorded.count = {}, 0
    steps = Steps(model.train(), 0, settings(lr=1e-3, batch_size=3, micro_batch_size=2, dtype="float32"), ranks=ranks)
    losses = [steps.update(step, ROWS)["loss"] for step in (1, 2)]
    save_file(Recorded.kept, out / f"gradients-{ranks.rank}.safetensors")
    esft.save_adapter(model, out / "tuned")
    found |= {"losses": losses, "digest": swapped_state(model).base.digest}
    found["sizes"] = [sizes for name, sizes in dealt_parameters(model).items() if name.endswith("down_proj")]
    # The tokenizer has more words than the other model.
    found["answer"] = name != "biased" and answer(model.eval(), tiny_tokenizer(), [record("count", "x")], 4)
    return found


def at(folder: Path, end: str, name: str) -> Path:
    (out := folder / f"{name}-{end}").mkdir(exist_ok=True)
    return out


def bytes_of(reference: StorageWeakRef) -> int:
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return 0 if storage is None else storage.nbytes()


def every(folder: Path, names: list[str]) -> dict:
    steps_module.MasterAdamW = Recorded
    found = {}
    with joined() as ranks:
        for name in names:
            how = DistributedConfig(**SPREAD[name][1])
            base = folder / SPREAD[name][0]
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, distributed_config=how)
            before = own_bytes(model)
            stock = [p.to_local().untyped_storage() for layer in moe_layers(model) for p in layer.experts.parameters()]
            left = [StorageWeakRef(storage) for storage in stock]
            found_mapped = not any(storage.resizable() for storage in stock)
            if name != "two copies":
                del stock
            if name in ("two copies", "biased"):  # they may have run before
                model.eval()(input_ids=torch.arange(6)[None])
            found[name] = used(model, base, name, ranks, at(folder, "spread", name))
            assert is_apart(model) and ranks.lockstep
            assert not any(p.requires_grad for n, p in model.named_parameters() if ".trained_" not in n)
            assert all(p.grad is None for n, p in model.named_parameters() if ".trained_" not in n)
            found[name]["bytes"].insert(0, before)
            gc.collect()
            found[name]["left"] = sum(bytes_of(ref) for ref in left)
            found[name]["mapped"] = found_mapped
    return found


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Every one of ``SPREAD``: its folder, and what a single process and the ranks have found."""
    folder = tmp_path_factory.mktemp("spread")
    for family in {family for family, *_ in SPREAD.values()}:
        if family in FAMILIES:
            save_tiny(folder / family, family)
        else:
            zoo.tiny(family).save_pretrained(folder / family)
    patched, alone, ranks = steps_module.MasterAdamW, {}, {}
    steps_module.MasterAdamW = Recorded
    try:
        for name, (family, *_) in SPREAD.items():
            model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32)
            with joined() as one:
                alone[name] = used(model, folder / family, name, one, at(folder, "alone", name))
    finally:
        steps_module.MasterAdamW = patched
    for size in (2, 4):
        ended = job(folder, size, partial(every, folder, [name for name in SPREAD if SIZES[name] == size]))
        assert [e.status for e in ended] == [0] * size, [e.said for e in ended]
        assert "sequential" not in "".join(e.said for e in ended)  # PyTorch's warning of a gather along two axes
        for name in ended[0].value:
            ranks[name] = [e.value[name] for e in ended]
    return folder, alone, ranks


@pytest.mark.parametrize("name", SPREAD)
def test_loss_and_every_gradient_are_those_of_a_single_process(spread, name: str):
    folder, alone, ranks = spread
    for found in ranks[name]:
        assert found["losses"] == pytest.approx(alone[name]["losses"], rel=1e-5)
    expected = load_file(folder / f"{name}-alone" / "gradients-0.safetensors")
    parts = [load_file(folder / f"{name}-spread" / f"gradients-{rank}.safetensors") for rank in range(SIZES[name])]
    first = [n for n in expected if n.startswith("1/")]  # later ones are of weights that differ a little
    assert len(first) >= 4 and all(".trained_" in n for n in expected)
    assert {n for part in parts for n in part} == expected.keys()
    for n in first:
        found = torch.cat([part[n] for part in parts if n in part])
        assert torch.linalg.vector_norm(found - expected[n]) <= 5e-6 * torch.linalg.vector_norm(expected[n]), n


@pytest.mark.parametrize("name", SPREAD)
def test_an_adapter_is_a_single_process_s_byte_by_byte_until_it_trains(spread, name: str):
    folder, alone, ranks = spread
    before = [folder / f"{name}-{end}" / "swapped" for end in ("spread", "alone")]
    for file in ("adapter.safetensors", "expert_cfg.json"):
        assert (before[0] / file).read_bytes() == (before[1] / file).read_bytes()
    assert {found["digest"] for found in ranks[name]} == {alone[name]["digest"]}
    base, found, expected = (
        load_file(each / ADAPTER)
        for each in (before[1], *(folder / f"{name}-{end}" / "tuned" for end in ("spread", "alone")))
    )
    assert found.keys() == expected.keys()
    for n, tensor in expected.items():
        # Where a gradient is nearly zero Adam makes much of a rounding.
        ours, theirs = found[n] - base[n], tensor - base[n]
        assert theirs.any() and torch.linalg.vector_norm(ours - theirs) <= 0.01 * torch.linalg.vector_norm(theirs), n


@pytest.mark.parametrize("name", [name for name in SPREAD if SPREAD[name][2] == "bf16"])
def test_the_stock_model_s_checkpoint_is_a_single_process_s(spread, name: str):
    folder, *_ = spread
    found, expected = (folder / f"{name}-{end}" / "stock" for end in ("spread", "alone"))
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())
    for file in ("model.safetensors", "config.json"):
        assert (found / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.parametrize("name", SPREAD)
def test_experts_are_dealt_evenly_and_all_else_stays_cut_up(spread, name: str):
    _, alone, ranks = spread
    for found in ranks[name]:
        assert found["answer"] == alone[name]["answer"]
        assert found["left"] == 0  # bytes of what transformers had dealt out
        assert found["mapped"] is (name == "biased") or name not in ("two copies", "biased")
        assert [sum(sizes) for sizes in found["sizes"]] == [1, 3] and all(max(s) - min(s) <= 1 for s in found["sizes"])
        if name in ("two copies", "replicated"):
            assert found["sizes"][0].count(0) == 3
    assert len({tuple(map(tuple, found["sizes"])) for found in ranks[name]}) == 1
    before, after = (sum(bytes) for bytes in zip(*(found["bytes"] for found in ranks[name]), strict=True))
    if SPREAD[name][2] == "bf16":  # every expert is on one rank alone
        assert after == before if name != "replicated" else after < before


REFUSED = {
    "alone": ({"fsdp_size": 2, "ep_size": 2}, {}, {"ranks": None}, "the experts are spread over ranks: join the job"),
    "tensor parallel": (
        {"tp_size": 2, "ep_size": 2}, {}, {}, "of a model that is spread with tp_size 2"
    ),
    "tensor parallel alone": ({"tp_size": 2}, {}, {}, "of a model that is spread with tp_size 2"),
    "in a pipeline": ({"pp_size": 2}, {}, {}, "of a model that is spread with pp_size 2"),
    "without ep_size": ({"fsdp_size": 2}, {}, {}, "experts that FSDP2 alone has cut up are not dealt out"),
    "replicas alone": ({"dp_replicate_size": 2}, {}, {}, "experts that FSDP2 alone has cut up are not dealt out"),
    "shared": ({"fsdp_size": 2, "ep_size": 2}, {"shared_experts": True}, {}, "shared_experts cannot train where FSDP2"),
    "the rest": (
        {"fsdp_size": 2, "ep_size": 2}, {"non_expert_modules": True}, {}, "non_expert_modules cannot train where"
    ),
    "linear": ({"fsdp_size": 2, "ep_size": 2}, {}, {"frozen_linear": "nf4"}, "frozen_linear nf4: weights that FSDP2"),
    "offloaded": ({"fsdp_size": 2, "ep_size": 2, "fsdp_cpu_offload": True}, {}, {}, "with fsdp_cpu_offload True"),
}  # fmt: skip


# The same of four ranks.
REFUSED_BY_FOUR = {
    "tp": ({"tp_size": 4}, {}, {}, "with tp_size 4"),
    "tp and ep": ({"tp_size": 4, "ep_size": 4}, {}, {}, "with tp_size 4"),
    "tp and fsdp": ({"tp_size": 2, "fsdp_size": 2}, {}, {}, "with tp_size 2"),
    "all three": ({"tp_size": 2, "fsdp_size": 2, "ep_size": 2}, {}, {}, "with tp_size 2"),
    "ep of all": ({"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, {}, {}, "with tp_size 2"),
    "replicas of tp": ({"dp_replicate_size": 2, "tp_size": 2, "ep_size": 2}, {}, {}, "with tp_size 2"),
    "fsdp": ({"fsdp_size": 4}, {}, {}, "experts that FSDP2 alone has cut up are not dealt out"),
    "replicas of fsdp": ({"dp_replicate_size": 2, "fsdp_size": 2}, {}, {}, "experts that FSDP2 alone has cut up"),
}
# What transformers itself does not take, whatever the model.
NO_CONFIG = [
    {"ep_size": 2}, {"dp_replicate_size": 2, "ep_size": 2}, {"pp_size": 2, "ep_size": 2}, {"tp_size": 4, "ep_size": 2},
    {"fsdp_size": 2, "ep_size": 4}, {"fsdp_size": 2, "pp_size": 2}, {"dp_replicate_size": 2, "pp_size": 2},
]  # fmt: skip


@pytest.mark.parametrize("how", NO_CONFIG, ids=str)
def test_some_layouts_are_none_of_transformers_s(how: dict[str, int]):
    with pytest.raises(ValueError, match=r"`ep_size` must|FSDP with pipeline parallelism is not supported"):
        DistributedConfig(**how)


def refusals(base: Path, cases: dict) -> dict:
    found = {}
    with joined() as ranks:
        for name, (how, more, options, _) in cases.items():
            config = DistributedConfig(**how)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, distributed_config=config)
            options = {"ranks": ranks} | options
            options = {key: value for key, value in options.items() if value is not None}
            found[name] = refused(model, ExpertSelection({1: [6]}, **more), **options)
        config = DistributedConfig(fsdp_size=ranks.size, ep_size=ranks.size)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, distributed_config=config)
        moe_layers(model)[1].experts.extra = nn.Parameter(torch.zeros(1))
        found["unknown"] = refused(model, ExpertSelection({}), ranks=ranks)
    return found


def refused(model: nn.Module, selection: ExpertSelection, **options) -> str:
    before = [layer.experts for layer in moe_layers(model)]
    try:
        esft.swap(model, selection, **options)
    except InputError as error:
        assert [layer.experts for layer in moe_layers(model)] == before
        assert model.config.distributed_config is not None and all(p.requires_grad for p in model.parameters())
        return str(error)
    return "swapped"


@pytest.mark.parametrize(("size", "cases"), [(2, REFUSED), (4, REFUSED_BY_FOUR)], ids=["two", "four"])
def test_what_cannot_be_dealt_out_anew_is_refused_before_anything_is_touched(tmp_path, size: int, cases: dict):
    base = save_tiny(tmp_path / "base", "qwen3_moe")
    ended = job(tmp_path, size, partial(refusals, base, cases))
    assert [e.status for e in ended] == [0] * size, ended
    for found in (e.value for e in ended):
        for name, (*_, message) in cases.items():
            assert message in found[name], (name, found[name])
        assert found["unknown"].startswith("model.layers.1.mlp.experts: experts are not dealt out that are spread over")


def test_a_model_that_is_not_spread_is_none_of_this():
    model = tiny_model()
    assert not spread_model.check_spread(model, moe_layers(model), SELECTION, "nf4", joined)
