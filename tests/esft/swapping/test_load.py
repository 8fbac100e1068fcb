"""A model that is loaded swapped is the one that is loaded and then swapped."""

import json
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import esft
from esft.checkpoint import device
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model
from esft.experts.model_state import swapped_state
from esft.experts.moe_layers import moe_layers
from esft.experts.pooled_experts import FROZEN
from esft.experts.stock_layout import Layout
from esft.selection import ExpertSelection
from esft.swapping import load as module
from tests.esft import zoo
from tests.esft.checkpoint.files import rewrite, rewrite_json
from tests.esft.checkpoint.packed import BLOCK, fp8_checkpoint, mxfp4_checkpoint
from tests.esft.models import save_tiny, tiny_model, token_batch
from tests.esft.parallel.jobs import FirstOfTwo

SELECTION = ExpertSelection({1: [5, 2]})
MAKERS = {"fp8": fp8_checkpoint, "mxfp4": mxfp4_checkpoint}


def same(one, other) -> bool:
    """Whether two swapped models are alike in every tensor, in what trains and in what they remember."""
    tensors = one.state_dict(), other.state_dict()
    assert tensors[0].keys() == tensors[1].keys()
    kept = [(s.selection, s.base, s.required_grad, s.frozen) for s in map(swapped_state, (one, other))]
    trains = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (one, other)]
    alike = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*(t.values() for t in tensors), strict=True))
    return alike and kept[0] == kept[1] and trains[0] == trains[1] and not any(m.training for m in one.modules())


def streams(monkeypatch) -> None:
    """No stock model may be loaded."""
    monkeypatch.setattr(module, "load_model", None)


@pytest.mark.parametrize("family", zoo.families())
def test_it_is_the_stock_model_swapped_in_every_family(family: str, tmp_path):
    zoo.tiny(family).save_pretrained(tmp_path)
    try:
        stock = load_model(str(tmp_path))
    except esft.InputError as error:
        assert "Unrecognized configuration class" in str(error)  # not a causal language model to transformers
        return
    first = moe_layers(stock)[0]
    chosen = ExpertSelection({first.index: [2, 1]}, shared_experts=bool(first.shared_experts))
    assert same(esft.load(str(tmp_path), chosen), esft.swap(stock, chosen))


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_experts_go_into_a_format_as_they_come_from_the_files(
    frozen: str, family: str, original: bool, tmp_path, monkeypatch
):
    zoo.tiny(family).save_pretrained(tmp_path, save_original_format=original)
    stock = load_model(str(tmp_path))
    streams(monkeypatch)
    found = esft.load(str(tmp_path), SELECTION, frozen)
    assert same(found, esft.swap(stock, SELECTION, frozen=frozen))
    assert swapped_state(found).base.digest == Checkpoint.open(tmp_path).digest()
    experts = moe_layers(found)[-1].experts
    assert f"frozen={frozen!r}" in repr(experts) or frozen == "bf16"


@pytest.mark.parametrize("format", MAKERS)
def test_what_a_checkpoint_ships_in_few_bits_stays_as_it_is(format: str, tmp_path, monkeypatch):
    base = MAKERS[format](tmp_path / "base")
    stock = esft.swap(load_model(str(base)), SELECTION)
    streams(monkeypatch)
    found = esft.load(str(base), SELECTION)
    state = swapped_state(found)
    assert (state.frozen, state.lossless) == (format, True)
    assert state.base == swapped_state(stock).base and state.base.digest == Checkpoint.open(base).digest()
    held = sum(p.nbytes for n, p in found.named_parameters() if ".frozen_" in n and "bias" not in n)
    assert held < 0.6 * sum(p.nbytes for n, p in stock.named_parameters() if ".frozen_" in n and "bias" not in n)
    results = [model(**token_batch()).logits for model in (found, stock)]
    assert torch.equal(*results)
    gradients = []
    for model, logits in zip((found, stock), results, strict=True):
        logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True)) and gradients[0]
    # And so it can become the stock model again.
    assert esft.unswap(found).state_dict().keys() == (tensors := esft.unswap(stock).state_dict()).keys()
    assert all(torch.equal(p, tensors[name]) for name, p in found.state_dict().items())


@pytest.mark.parametrize("format", MAKERS)
def test_beside_few_bits_everything_is_in_the_dtype_that_is_asked_for(format: str, tmp_path):
    base = MAKERS[format](tmp_path / "base")
    found, coarse = (esft.load(str(base), SELECTION, dtype=dtype) for dtype in ("float32", "bfloat16"))
    for name, p in found.named_parameters():
        other = coarse.get_parameter(name)
        assert p.dtype == torch.float32 or ".frozen_" in name
        assert torch.equal(p.to(other.dtype), other)
    assert swapped_state(found).base.digest == swapped_state(coarse).base.digest


def test_few_bits_of_a_checkpoint_are_read_where_that_is_asked_for(tmp_path):
    base = fp8_checkpoint(tmp_path / "base")
    stock = load_model(str(base))
    assert same(esft.load(str(base), SELECTION, "bf16"), esft.swap(stock, SELECTION))
    other = esft.load(str(base), SELECTION, "nf4")
    assert not swapped_state(other).lossless
    assert same(other, esft.swap(load_model(str(base)), SELECTION, frozen="nf4"))


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that PyTorch has made and that are alive, and their largest sum."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage._cdata not in self.held:
                    self.held[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.held.pop(key)


@pytest.mark.parametrize("frozen", ["bf16", "nf4"])
def test_there_is_never_more_than_the_finished_model_and_a_layer(frozen: str, tmp_path):
    save_tiny(tmp_path / "base")
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 9}
    tiny_model(**sizes).save_pretrained(tmp_path / "base")
    with Living() as living:
        model = esft.load(str(tmp_path / "base"), SELECTION, frozen)
    finished = sum(p.nbytes for p in model.parameters())
    layer = 8 * 3 * 64 * 64 * 4
    stock = sum(p.nbytes for p in tiny_model(**sizes).parameters())
    assert living.most < finished + layer
    assert stock > finished + 3 * layer or frozen == "bf16"


def test_experts_compute_by_the_backend_and_with_the_memory_that_are_asked_for(tmp_path):
    base = save_tiny(tmp_path / "base")
    model = esft.load(str(base), ExpertSelection({1: [0]}), backend="reference", recompute="frozen")
    assert {(layer.experts.backend, layer.experts.recompute) for layer in moe_layers(model)} == {
        ("reference", "frozen")
    }


def test_where_experts_cannot_come_one_by_one_the_stock_model_is_swapped(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    loaded = []
    monkeypatch.setattr(module, "load_model", lambda *asked: loaded.append(asked) or load_model(*asked))
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    esft.load(str(base), SELECTION)
    assert loaded == []
    monkeypatch.setattr(module, "on_one_device", lambda: False)  # several GPUs
    assert same(esft.load(str(base), SELECTION, "int8", "float32"), esft.load(str(base), SELECTION, "int8", "float32"))
    assert loaded == [(str(base), "float32", False)] * 2
    monkeypatch.setattr(module, "on_one_device", lambda: True)
    monkeypatch.setattr(Layout, "is_fused", False)  # experts that the kernels do not compute
    with pytest.warns(UserWarning, match="the kernels do not compute these experts"):
        esft.load(str(base), SELECTION)
    assert len(loaded) == 3


def test_a_stock_model_is_swapped_with_all_that_is_asked_for(tmp_path, monkeypatch):
    asked: list[tuple] = []
    monkeypatch.setattr(module, "on_one_device", lambda: False)
    monkeypatch.setattr(module, "load_model", lambda *_: "stock")
    monkeypatch.setattr(module, "swap", lambda *given: asked.append(given))
    how = {"backend": "reference", "recompute": "frozen", "frozen": "int8", "frozen_linear": "nf4"}
    ranks = FirstOfTwo()
    esft.load(str(save_tiny(tmp_path / "base")), SELECTION, **how, ranks=ranks)
    assert asked == [("stock", SELECTION, *how.values(), ranks)]


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_counts_the_tensors_where_progress_is_to_be_seen(progress: bool, tmp_path, capfd):
    base = save_tiny(tmp_path / "base")
    esft.load(str(base), ExpertSelection({1: [0]}), frozen="int8", progress=progress)
    assert ("loading" in capfd.readouterr().err) == progress


def test_a_hubs_checkpoint_is_the_folder_that_it_is_fetched_to(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    real = module.load_without
    monkeypatch.setattr(module, "load_without", lambda path, *more: real({"owner/name": str(base)}[path], *more))
    monkeypatch.setattr(module, "downloaded", lambda path: {"owner/name": base}[path])
    found = esft.load("owner/name", SELECTION)
    monkeypatch.undo()
    assert same(found, esft.load(str(base), SELECTION))


def lose(name: str, tensors: dict) -> None:
    del tensors[name]


def cut(name: str, tensors: dict) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


def no_number(name: str, tensors: dict) -> None:
    tensors[name].view(-1)[-1] = float("nan")


UP = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize(
    ("make", "damage", "frozen", "message"),
    [
        (save_tiny, partial(lose, UP), "auto", rf"base: tensor {UP} is missing \(1 missing in all\)$"),
        (save_tiny, partial(cut, UP), "nf4", rf"tensor {UP}: has shape \(19, 32\), the model's has \(20, 32\)$"),
        (save_tiny, partial(no_number, UP), "nf4", f"tensor {UP}: nf4: weights .*are not finite"),
        (fp8_checkpoint, partial(no_number, f"{UP}_scale_inv"), "auto", f"{UP}: a scale of fp8 is not finite"),
        (fp8_checkpoint, partial(cut, f"{UP}_scale_inv"), "auto", rf"{UP} scale_inv of fp8 must be torch.float32"),
        (
            partial(fp8_checkpoint, moe_intermediate_size=192),
            lambda tensors: None,
            "fp8",
            "cannot be one matrix in fp8",
        ),
    ],
    ids=["missing", "cut", "no number", "no scale", "cut scales", "odd blocks"],
)
def test_a_tensor_that_does_not_fit_is_named(make, damage, frozen: str, message: str, tmp_path):
    base = make(tmp_path / "base")
    rewrite(base, damage)
    with pytest.raises(esft.InputError, match=message):
        esft.load(str(base), SELECTION, frozen)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "base: weights quantized by 'gptq' are not supported; fp8 and mxfp4 are"),
        ({"quant_method": "awq"}, "base: weights quantized by 'awq' are not supported"),
        ({"bits": 4}, "base: weights quantized by None are not supported"),
        ({"quant_method": "fp8"}, "base: fp8 with weight_block_size None is not supported, only"),
    ],
)
def test_a_quantization_that_is_not_known_is_named(said: dict, message: str, tmp_path):
    base = save_tiny(tmp_path / "base")
    rewrite_json(base / "config.json", lambda config: config.update(quantization_config=said))
    rewrite(base, lambda tensors: tensors.update(qweight=torch.zeros(2, dtype=torch.int32)))
    with pytest.raises(esft.InputError, match=message):
        esft.load(str(base), SELECTION)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frozen": "nf3"}, "frozen must be one of bf16, int8, nf4, nf4_double, fp8, mxfp4, got 'nf3'"),
        ({"recompute": "all"}, "recompute must be one of"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"selection": ExpertSelection({7: [0]})}, "layer 7"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(arguments: dict, message: str, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    monkeypatch.setattr(module, "load_without", None)
    with pytest.raises(esft.InputError, match=message):
        esft.load(str(base), **({"selection": SELECTION} | arguments))


def test_an_adapter_trained_over_few_bits_fits_the_base_and_merges_into_it(tmp_path):
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    model = esft.load(str(base), SELECTION, "nf4")
    with torch.no_grad():
        for layer in moe_layers(model)[:1]:
            layer.experts.trained_down_proj.mul_(1.5)
    esft.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "manifest.json").read_text())["frozen"] == "nf4"
    merged = load_model(str(esft.merge(base, tmp_path / "adapter", tmp_path / "merged")))
    wanted = load_model(str(base)).state_dict()
    for name, tensor in merged.state_dict().items():
        if name.endswith("layers.1.mlp.experts.down_proj"):
            wanted[name][[5, 2]] *= 1.5
        assert torch.equal(tensor, wanted[name]), name
    assert esft.load_adapter(esft.load(str(base), SELECTION, "int8"), tmp_path / "adapter") is not None


@pytest.mark.parametrize("folder", ["merged", "adapter"])
def test_what_needs_exact_weights_is_refused_over_few_bits(folder: str, tmp_path):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(esft.load(str(base), ExpertSelection({2: [0]})), tmp_path / "adapter")
    model = esft.load(str(base), SELECTION, "int8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(esft.InputError, match="unswap needs the stock model's weights, .* in int8"):
        esft.unswap(model)
    with pytest.raises(esft.InputError, match="save_pretrained needs the stock model's weights, .* in int8"):
        model.save_pretrained(tmp_path / "whole")
    with pytest.raises(esft.InputError, match=r"experts.*: the frozen experts are in int8; load it with esft.load"):
        model.load_state_dict(load_model(str(base)).state_dict())
    with pytest.raises(esft.InputError, match="expert_cfg.json: layer 2: expert 0 is frozen in int8"):
        esft.load_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "whole").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_in_few_bits_can_change_its_dtype_and_read_its_own_state(tmp_path):
    base = save_tiny(tmp_path / "base")
    model = esft.load(str(base), SELECTION, "nf4")
    half = esft.load(str(base), SELECTION, "nf4").to(torch.bfloat16)
    packed = [name for name, p in model.named_parameters() if ".frozen_" in name]
    assert packed and all(torch.equal(half.get_parameter(n), model.get_parameter(n)) for n in packed)
    wanted = model(**token_batch()).logits
    assert half(**token_batch()).logits.dtype == torch.bfloat16
    other = esft.load(str(base), SELECTION, "nf4")
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**token_batch()).logits, wanted)


def test_odd_rows_in_fp8_can_be_read_or_kept_in_another_format(tmp_path):
    base = fp8_checkpoint(tmp_path / "base", moe_intermediate_size=BLOCK + BLOCK // 2)
    assert swapped_state(esft.load(str(base), SELECTION, "int8")).frozen == "int8"
