"""Several adapters in one batch: every row is what the model with its adapter alone gives."""

import copy
import json

import pytest
import torch

import esft
from esft.adapters.mixed import load_adapters
from esft.checkpoint.adapter_tensors import adapter_tensors
from esft.data.records import Record
from esft.errors import InputError
from esft.evaluation.answers import answer
from esft.experts.model_state import MixedAdapters, model_state, swapped_state
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import tiny_model, tiny_tokenizer, token_batch

NAMES = ["b", "__base__", "a", "b"]
EMPTY = ExpertSelection({})


def moved(model, seed: int):
    """A swapped model whose selected tensors have moved."""
    torch.manual_seed(seed)
    for tensor in adapter_tensors(model, swapped_state(model).selection).values():
        tensor.write(tensor.read() + 0.2 * torch.randn_like(tensor.read()))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of ``tiny_model()``; both have experts 5 of layer 1, and one nothing in layer 2."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, experts) in enumerate({"a": {1: [5, 2]}, "b": {1: [5], 2: [0, 7]}}.items()):
        esft.save_adapter(moved(esft.swap(tiny_model(), ExpertSelection(experts)), seed), root / name)
    return {name: root / name for name in ("a", "b")}


def alone(folders, name: str, frozen: str = "bf16"):
    """The model with one adapter, its other experts frozen in a format."""
    if name == "__base__":
        return esft.swap(tiny_model(), EMPTY, frozen=frozen)
    selection = ExpertSelection.load(folders[name] / "expert_cfg.json")
    return esft.load_adapter(esft.swap(tiny_model(), selection, frozen=frozen), folders[name])


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["bf16", "int8"])
def test_every_sequence_has_the_logits_of_its_adapter_alone(folders, frozen: str):
    model = tiny_model() if frozen == "bf16" else esft.swap(tiny_model(), EMPTY, frozen=frozen)
    assert load_adapters(model, folders) is model
    batch = token_batch(rows=4)
    logits = model(**batch, adapter_names=NAMES).logits
    singles = {name: alone(folders, name, frozen)(**batch).logits for name in set(NAMES)}
    for row, name in enumerate(NAMES):
        close(logits[row], singles[name][row])
    assert (singles["a"] - singles["b"]).abs().max() > 0.01 < (singles["a"] - singles["__base__"]).abs().max()
    close(model(**batch).logits, singles["__base__"])  # no name is kept
    for name in ("b", None, "a"):
        close(esft.set_adapter(model, name)(**batch).logits, singles[name or "__base__"])
    close(model(**batch, adapter_names=NAMES).logits, logits)  # whichever is set


def test_generate_answers_every_prompt_with_its_adapter(folders):
    model = esft.load_adapters(tiny_model(), folders)
    batch = token_batch(rows=4) | {"attention_mask": torch.ones(4, 17, dtype=torch.long)}
    for settings in ({}, {"num_beams": 3}):
        how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 258} | settings
        found = model.generate(**batch, adapter_names=NAMES, **how)
        for row, name in enumerate(NAMES):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            expected = alone(folders, name).generate(**one, **how)
            assert torch.equal(found[row, : expected.shape[1]], expected[0]), (row, settings)
    plain = model.generate(**batch, **how)
    assert torch.equal(plain, alone(folders, "__base__").generate(**batch, **how))
    assert not torch.equal(plain, found)


def test_answers_are_those_of_each_prompts_adapter_however_they_are_batched(folders):
    model, tokenizer = esft.load_adapters(tiny_model(), folders), tiny_tokenizer()
    prompts = [Record([{"role": "user", "content": text}]) for text in ("hello", "a", "say", "b")]
    found = answer(model, tokenizer, prompts, 6, batch_size=2, adapter_names=NAMES)
    for prompt, name, reply in zip(prompts, NAMES, found, strict=True):
        assert answer(alone(folders, name), tokenizer, [prompt], 6) == [reply]
    assert answer(model, tokenizer, prompts, 6) != found


def test_each_adapter_trains_on_its_own_sequences_and_is_saved(folders, tmp_path):
    model, batch = esft.load_adapters(tiny_model(), folders), token_batch(rows=4)
    model(**batch, adapter_names=NAMES).logits.pow(2).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4 and all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=0.01).step()
    for name in folders:
        one = alone(folders, name)
        own = [row for row, each in enumerate(NAMES) if each == name]
        one(**{key: value[own] for key, value in batch.items()}).logits.pow(2).sum().backward()
        torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.01).step()
        esft.set_adapter(model, name)
        expected = adapter_tensors(one, swapped_state(one).selection)
        for key, tensor in adapter_tensors(model, swapped_state(model).selection).items():
            close(tensor.read(), expected.pop(key).read())
        assert not expected
        esft.save_adapter(model, tmp_path / name)
        close(alone({name: tmp_path / name}, name)(**batch).logits, one(**batch).logits)
    esft.set_adapter(model, None)
    with pytest.raises(InputError, match=r"side by side: set_adapter\(model, NAME\) says which one to save"):
        esft.save_adapter(model, tmp_path / "none")
    close(model(**batch).logits, alone(folders, "__base__")(**batch).logits)


def test_the_base_is_held_once_and_a_copy_of_the_model_is_its_own(folders, tmp_path):
    model = esft.load_adapters(tiny_model(), folders)
    experts = moe_layers(model)[0].experts
    assert (experts.trained, experts.num_frozen, experts.num_experts) == ((5, 2, 5), 8, 8)
    assert experts.positions.tolist()[1] == [3, 4, 1, 6, 7, 0, 9, 10]
    batch = token_batch(rows=4)
    expected, twin = model(**batch, adapter_names=NAMES).logits, copy.deepcopy(model)
    with torch.no_grad():
        experts.trained_down_proj.zero_()
    assert torch.equal(twin(**batch, adapter_names=NAMES).logits, expected)
    assert twin.generate.__getstate__()[0] is twin
    esft.set_adapter(twin, "b").save_pretrained(tmp_path / "b")
    saved = type(model).from_pretrained(tmp_path / "b")
    close(saved(**batch).logits, alone(folders, "b")(**batch).logits)


def test_experts_that_plain_pytorch_computes_are_mixed_as_well(folders):
    with pytest.warns(UserWarning, match="plain PyTorch"):
        base, model = (esft.swap(tiny_model(hidden_act="tanh"), EMPTY) for _ in "12")
        single = esft.swap(tiny_model(hidden_act="tanh"), ExpertSelection({2: [3]}))
    esft.save_adapter(moved(single, 0), folders["a"].parent / "tanh")
    esft.load_adapters(model, {"x": folders["a"].parent / "tanh"})
    batch = token_batch()
    logits = model(**batch, adapter_names=["__base__", "x", "x"]).logits
    close(logits[1:], single(**batch).logits[1:])
    close(logits[0], base(**batch).logits[0])


def test_names_that_do_not_fit_are_refused_and_the_next_batch_is_right(folders):
    model, batch = esft.load_adapters(tiny_model(), folders), token_batch()
    expected = model(**batch, adapter_names=["a"] * 3).logits
    for names, message in {
        ("a", "c", "b"): r"holds no adapter named 'c'; it holds \['a', 'b'\]",
        ("a", "b"): "adapter_names has 2 names, and the batch 3 sequences",
        "aab": "adapter_names must be a list of names",
        ("a", "b", None): "adapter_names must be a list of names",
    }.items():
        for call in (model, model.generate):
            with pytest.raises(InputError, match=message):
                call(**batch, adapter_names=names)
    with pytest.raises(InputError, match="no adapter named 'c'"):
        esft.set_adapter(model, "c")
    with pytest.raises(InputError, match="7 tokens do not divide into 2 sequences"):
        MixedAdapters({}, running=torch.tensor([0, 1])).of_tokens(7)
    with pytest.raises(ValueError):  # of the model's own, in the middle of a batch with names
        model(input_ids=batch["input_ids"], inputs_embeds=torch.zeros(3, 17, 32), adapter_names=["b"] * 3)
    assert model_state(model).mixed.running is None
    assert torch.equal(model(**batch, adapter_names=["a"] * 3).logits, expected)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(InputError, match="adapter_names and gradient checkpointing do not go together"):
        model(**batch, adapter_names=["a"] * 3)


def test_adapters_that_cannot_stand_side_by_side_leave_the_model_as_it_was(folders, tmp_path):
    shared = esft.swap(tiny_model(), ExpertSelection({1: [0]}, shared_experts=True))
    esft.save_adapter(shared, tmp_path / "shared")
    esft.save_adapter(esft.swap(tiny_model(seed=1), ExpertSelection({1: [0]})), tmp_path / "other")
    esft.save_adapter(esft.swap(tiny_model(), ExpertSelection({1: [0]}), frozen="int8"), tmp_path / "int8")
    esft.save_adapter(esft.swap(tiny_model(), ExpertSelection({1: [0]})), tmp_path / "broken")
    (tmp_path / "broken" / "adapter.safetensors").write_bytes((folders["b"] / "adapter.safetensors").read_bytes())
    model, batch = tiny_model(), token_batch()
    before, names = model(**batch).logits, [name for name, _ in model.named_parameters()]
    for folder, message in {
        "shared": "shared: trains shared experts, of which a model has one",
        "other": "other: made from another base",
        "int8": "int8: was made with frozen in int8, and .*a in bf16",
        "broken": "broken: tensor .* is missing",
        "nothing": "nothing: not an adapter folder",
    }.items():
        with pytest.raises(InputError, match=message):
            esft.load_adapters(model, {"a": folders["a"], "x": tmp_path / folder})
        assert [name for name, _ in model.named_parameters()] == names
        assert model_state(model).mixed is None and "generate" not in vars(model)
    assert torch.equal(model(**batch).logits, before)
    for adapters, message in (
        ({}, "no adapters are given"),
        ({"__base__": folders["a"]}, "cannot be named '__base__'"),
        ({"": folders["a"]}, "cannot be named ''"),
    ):
        with pytest.raises(InputError, match=message):
            esft.load_adapters(model, adapters)
    with pytest.raises(InputError, match="own experts train"):
        esft.load_adapters(esft.swap(tiny_model(), ExpertSelection({1: [5]})), folders)


def test_a_swapped_model_stays_swapped_and_without_adapters_where_one_cannot_be_loaded(folders, tmp_path):
    esft.save_adapter(esft.swap(tiny_model(), ExpertSelection({1: [0]})), tmp_path / "broken")
    (tmp_path / "broken" / "adapter.safetensors").write_bytes((folders["b"] / "adapter.safetensors").read_bytes())
    model, batch = esft.swap(tiny_model(), EMPTY), token_batch()
    shapes, before = {name: p.shape for name, p in model.named_parameters()}, model(**batch).logits
    with pytest.raises(InputError, match="broken: tensor .* is missing"):
        esft.load_adapters(model, {"a": folders["a"], "x": tmp_path / "broken"})
    assert swapped_state(model).selection == EMPTY
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(**batch).logits, before)
    esft.load_adapters(model, folders)
    close(model(**batch, adapter_names=["a"] * 3).logits, alone(folders, "a")(**batch).logits)


def test_names_of_an_answer_that_broke_off_are_not_those_of_the_next_batch(folders):
    model, batch = esft.load_adapters(tiny_model(), folders), token_batch()
    expected = model(**batch).logits
    with pytest.raises(ValueError, match="no_such_setting"):
        model.generate(**batch, adapter_names=["a"] * 3, no_such_setting=1)
    assert torch.equal(model(**batch).logits, expected)


def test_names_are_counted_however_a_batch_is_given(folders):
    model, batch = esft.load_adapters(tiny_model(), folders), token_batch()
    ids = batch["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    for call in (
        lambda: model(ids, adapter_names=["a"]),
        lambda: model(inputs_embeds=embedded, adapter_names=["a"]),
        lambda: model.generate(ids, adapter_names=["a"]),
        lambda: model.generate(inputs=ids, adapter_names=["a"]),
    ):
        with pytest.raises(InputError, match="^adapter_names has 1 names, and the batch 3 sequences$"):
            call()


def test_layers_that_would_be_made_again_in_a_training_are_none_in_evaluation(folders):
    model, batch = esft.load_adapters(tiny_model(), folders), token_batch()
    expected = model(**batch, adapter_names=["a"] * 3).logits
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.eval()(**batch, adapter_names=["a"] * 3).logits, expected)


def test_experts_in_a_module_list_hold_no_adapters_side_by_side(tmp_path):
    with pytest.warns(UserWarning, match="they are a ModuleList"):
        esft.save_adapter(esft.swap(listed(tiny_model()), ExpertSelection({1: [0], 2: [3]})), tmp_path / "a")
    with pytest.raises(InputError, match="a: layer 1 has its experts in a ModuleList, which holds one adapter only$"):
        load_adapters(listed(tiny_model()), {"a": tmp_path / "a"})


def test_a_model_with_adapters_side_by_side_takes_no_others(folders, tmp_path):
    model = esft.load_adapters(tiny_model(), folders)
    for call in (
        lambda: esft.load_adapters(model, folders),
        lambda: esft.load_adapter(model, folders["a"]),
        lambda: esft.unswap(model),
        lambda: esft.unswap(torch.compile(model)),
        lambda: model.load_state_dict(tiny_model().state_dict()),
    ):
        with pytest.raises(InputError, match="holds adapters"):
            call()
    one = esft.load_adapter(tiny_model(), folders["a"], name="a")
    with pytest.raises(InputError, match="holds adapters already"):
        esft.load_adapters(one, folders)


def test_what_the_manifest_says_of_the_choice_is_kept(folders, tmp_path):
    manifest = json.loads((folders["a"] / "manifest.json").read_text())
    for name in folders:
        (tmp_path / name).mkdir()
        for file in folders[name].iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest | {"chosen_by": {"by": "token"}}))
    model = esft.set_adapter(esft.load_adapters(tiny_model(), {n: tmp_path / n for n in folders}), "a")
    esft.save_adapter(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["chosen_by"] == {"by": "token"}
