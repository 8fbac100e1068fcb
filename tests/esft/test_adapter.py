import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import esft
from esft.adapter import (
    Loaded,
    adapter_weights,
    check_adapter,
    check_digest,
    check_model,
    load_selection,
    loaded_slots,
    open_manifest,
)
from esft.checkpoint import Checkpoint, load_model
from esft.select import ExpertSelection
from esft.slots import Slot, adapter_slots
from esft.swap import swap_state
from tests.esft.models import FAMILIES, save_tiny, tiny_model, token_batch


def tuned(family: str = "deepseek_v2", **more):
    """A swapped model whose selected tensors have moved."""
    model = esft.swap(tiny_model(family), ExpertSelection({2: [5, 0], FAMILIES[family][1]: [1]}, **more))
    state = swap_state(model)
    assert state is not None
    torch.manual_seed(7)
    with torch.no_grad():
        for slot in adapter_slots(model, state.selection).values():
            tensor = slot.read()
            slot.write(tensor + torch.randn_like(tensor) * 0.05)
    return model


def logits(model) -> torch.Tensor:
    return model(**token_batch()).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("into_swapped", [False, True])
def test_a_saved_adapter_gives_the_tuned_logits(tmp_path, family: str, into_swapped: bool):
    model = tuned(family)
    esft.save_adapter(model, tmp_path / "a")
    other = tiny_model(family)
    before = logits(other)
    if into_swapped:
        esft.swap(other, ExpertSelection({2: [7, 5]}))
    esft.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), logits(model), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(logits(other), before, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_names_are_those_of_the_checkpoint(tmp_path, family: str):
    base = save_tiny(tmp_path / "base", family)
    esft.save_adapter(tuned(family), tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter.safetensors").keys()
    assert len(names) == 9
    assert names <= load_file(base / "model.safetensors").keys()


def test_shared_experts_and_non_expert_modules_are_saved_when_selected(tmp_path):
    model = tuned(shared_experts=True, non_expert_modules=True)
    esft.save_adapter(model, tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter.safetensors").keys()
    assert {"model.layers.1.mlp.shared_experts.up_proj.weight", "model.norm.weight", "lm_head.weight"} <= names
    torch.testing.assert_close(logits(esft.load_adapter(tiny_model(), tmp_path / "a")), logits(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_says_what_was_trained_from_what_and_how_it_was_chosen(tmp_path, dtype: str):
    base = save_tiny(tmp_path / "base")
    chosen = ExpertSelection({2: [5, 0], 1: [1]}, shared_experts=True, chosen_by={"by": "gate", "top_p": 0.25})
    model = esft.swap(load_model(str(base), dtype), chosen)
    folder = esft.save_adapter(model, str(tmp_path / "a"))
    assert folder == tmp_path / "a"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "expert_cfg.json", "manifest.json"]
    assert json.loads((folder / "manifest.json").read_text()) == {
        "format_version": 1,
        "base_model": str(base),
        "base_digest": Checkpoint.open(base).digest(),
        "base_dtype": dtype,
        "chosen_by": {"by": "gate", "top_p": 0.25},
    }
    assert ExpertSelection.load(folder / "expert_cfg.json") == chosen
    with safe_open(folder / "adapter.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}  # what transformers asks of a file
        assert {handle.get_slice(name).get_dtype() for name in handle.keys()} == {  # noqa: SIM118
            {"float32": "F32", "bfloat16": "BF16"}[dtype]
        }


def test_a_disk_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error")

    monkeypatch.setattr("esft.adapter.save_file", fails)
    with pytest.raises(esft.InputError, match=r"/a: I/O error$"):
        esft.save_adapter(tuned(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_which_slots_were_written_depends_on_the_base_that_is_asked_for():
    assert loaded_slots(SimpleNamespace(), None) == loaded_slots(SimpleNamespace(), "one") == frozenset()
    model = SimpleNamespace(esft_loaded=Loaded("one", frozenset("a"), frozenset("ab")))
    assert loaded_slots(model, "one") == frozenset("a")
    assert loaded_slots(model, "two") == frozenset()
    assert loaded_slots(model, None) == frozenset("ab")


@pytest.mark.parametrize("name", [None, "a"])
def test_what_a_loaded_adapter_wrote_outside_the_selection_is_not_left_out_in_silence(tmp_path, name: str | None):
    esft.save_adapter(tuned(), tmp_path / "a")  # experts 5 and 0 of layer 2, 1 of layer 1
    model = esft.swap(tiny_model(), ExpertSelection({2: [5, 1], 1: [1]}))
    esft.load_adapter(model, tmp_path / "a", name)
    if name is not None:
        esft.save_adapter(model, tmp_path / "base")  # held, but not written yet
        esft.set_adapter(model, name)
    missing = r"model\.layers\.2\.mlp\.experts\.0\.down_proj\.weight"
    with pytest.raises(esft.InputError, match=rf"has changed {missing}, which is not in .* \(3 such in all\)"):
        esft.save_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_was_loaded_before_a_swap_is_of_its_base_and_need_not_be_saved_again(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    model = esft.load_adapter(tiny_model(), tmp_path / "a")
    esft.swap(model, ExpertSelection({2: [7]}))
    esft.save_adapter(model, tmp_path / "b")
    assert len(load_file(tmp_path / "b" / "adapter.safetensors")) == 3


@pytest.mark.parametrize(
    ("manifest", "dtype", "hint"),
    [
        ({"base_dtype": "float32"}, torch.bfloat16, True),
        ({"base_dtype": "bfloat16"}, torch.bfloat16, False),
        ({"base_dtype": "float32"}, None, False),
        ({"base_dtype": None}, torch.bfloat16, False),
        ({}, torch.bfloat16, False),
    ],
)
def test_another_base_is_named_and_the_dtype_where_that_may_be_why(manifest, dtype, hint: bool):
    ours, theirs = "0123456789abcdef", "fedcba9876543210"
    manifest = {"base_model": "tiny", "base_digest": theirs} | manifest
    check_digest(manifest, theirs, "x/a", dtype)
    with pytest.raises(esft.InputError) as raised:
        check_digest(manifest, ours, "x/a", dtype)
    expected = (
        "x/a: made from another base (tiny, digest fedcba987654), not from these weights (0123456789ab)"
        + "; it was trained in float32 and these are in bfloat16: should they be the same, load them so" * hint
    )
    assert str(raised.value) == expected


def test_a_manifest_without_a_digest_is_of_another_base():
    with pytest.raises(esft.InputError, match=r"another base \(None, digest None\)"):
        check_digest({}, "0123456789abcdef", "a")


@pytest.mark.parametrize(
    ("base_dtype", "base_digest", "fits"),
    [
        ("float32", "plain", True),
        ("float32", "rounded", False),
        ("float16", "plain", True),
        ("float16", "rounded", True),
        ("float16", "other", False),
        (None, "plain", True),
    ],
)
def test_only_an_adapter_trained_in_float16_is_held_to_the_rounded_base_too(tmp_path, base_dtype, base_digest, fits):
    (tmp_path / "expert_cfg.json").write_text("")
    manifest = {"format_version": 1, "base_digest": base_digest, "base_dtype": base_dtype}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    digests = {None: "plain", torch.float16: "rounded"}
    if fits:
        assert check_adapter(tmp_path, digests.__getitem__, torch.float32) == manifest
    else:
        with pytest.raises(esft.InputError, match=rf"^{tmp_path}: made from another base"):
            check_adapter(tmp_path, digests.__getitem__, torch.float32)


def test_an_adapter_without_a_manifest_is_taken_with_a_warning(tmp_path):
    (tmp_path / "expert_cfg.json").write_text("")
    (tmp_path / "manifest.json").mkdir()

    def merging():
        return check_adapter(tmp_path, lambda dtype: "", None)

    said = rf"^{tmp_path}: does not say which base it is of \(no manifest\.json\); only"
    with pytest.warns(UserWarning, match=said) as warned:
        assert merging() == {}
    here = inspect.currentframe()
    assert here is not None
    assert (warned[0].filename, warned[0].lineno) == (__file__, here.f_lineno - 3)  # who called what calls it
    (tmp_path / "expert_cfg.json").unlink()
    (tmp_path / "expert_cfg.json").mkdir()
    with pytest.raises(esft.InputError, match=rf"^{tmp_path}: not an adapter folder \(no expert_cfg\.json\)$"):
        check_adapter(tmp_path, lambda dtype: "", None)


@pytest.mark.parametrize("content", ["[1]", "{}", '{"format_version": 2}', '{"format_version": null}'])
def test_a_manifest_of_another_format_is_refused(tmp_path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(esft.InputError, match=r"/manifest\.json: format_version must be 1$"):
        open_manifest(tmp_path)


def test_a_selection_is_read_with_its_switches_and_held_to_the_model(tmp_path):
    chosen = ExpertSelection({1: [7]}, shared_experts=True, non_expert_modules=True)
    chosen.save(tmp_path / "expert_cfg.json")
    assert load_selection(tmp_path, tiny_model()) == chosen


ONE = "model.layers.1.mlp.experts.1.{}_proj.weight"


def files_of(folder, *parts: dict) -> dict:
    """The slots of one expert, and a folder with files of tensors."""
    folder.mkdir()
    for number, tensors in enumerate(parts):
        save_file(tensors, folder / f"model-{number}.safetensors")
    return adapter_slots(tiny_model(), ExpertSelection({1: [1]}))


def one_expert(**change) -> dict:
    sizes = {"gate": (20, 32), "up": (20, 32), "down": (32, 20)}
    tensors = {ONE.format(name): torch.randn(*size) for name, size in sizes.items()}
    return tensors | {ONE.format(name): value for name, value in change.items()}


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_weights_of_several_files_have_the_models_names(tmp_path, prefix: str, dtype: torch.dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in one_expert().items()}
    parts = [{prefix + name.removeprefix("model."): tensor} for name, tensor in tensors.items()]
    with adapter_weights(tmp_path / "a", files_of(tmp_path / "a", *parts)) as weights:
        for name, tensor in tensors.items():
            assert torch.equal(weights.get_tensor(name), tensor)


def test_a_name_that_a_slot_has_is_not_taken_for_a_shortened_one(tmp_path):
    """A model may have one tensor under a name and another under that name after ``model.``."""
    tensors = {"norm.weight": torch.zeros(3), "model.norm.weight": torch.ones(3)}
    files_of(tmp_path / "a", tensors)
    slots = {name: Slot(name, None, (3,), ()) for name in tensors}
    with adapter_weights(tmp_path / "a", slots) as weights:
        assert all(torch.equal(weights.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_our_own_file_is_read_alone(tmp_path):
    tensors = one_expert()
    slots = files_of(tmp_path / "a", one_expert())
    save_file(tensors, tmp_path / "a" / "adapter.safetensors")
    with adapter_weights(tmp_path / "a", slots) as weights:
        assert all(torch.equal(weights.get_tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"holds no safetensors file \(pickled weights are never loaded\)"),
        ([one_expert(), {ONE.format("up"): torch.zeros(20, 32)}], rf"holds tensor {ONE.format('up')} twice"),
        ([{ONE.format("gate"): torch.zeros(20, 32)}], rf"tensor {ONE.format('down')} is missing \(2 missing in all\)"),
        (
            [one_expert() | {"z": torch.zeros(1), "model.a": torch.zeros(1)}],
            r"tensor model\.a belongs to nothing selected \(2 such in all\)",
        ),
        ([one_expert(up=torch.zeros(20, 32, dtype=torch.int64))], rf"tensor {ONE.format('up')} is I64, not floating"),
        ([one_expert(up=torch.zeros(20, 32, dtype=torch.uint8))], rf"tensor {ONE.format('up')} is U8, not floating"),
        (
            [one_expert(down=torch.zeros(20, 32))],
            rf"tensor {ONE.format('down')} has shape \(20, 32\), the base has \(32, 20\)",
        ),
        ([one_expert(up=torch.zeros(640))], rf"tensor {ONE.format('up')} has shape \(640,\), the base has \(20, 32\)"),
    ],
)
def test_weights_that_are_not_exactly_the_selections_are_named(tmp_path, parts, message: str):
    slots = files_of(tmp_path / "a", *parts)
    with pytest.raises(esft.InputError, match=f"^{tmp_path}/a: {message}"), adapter_weights(tmp_path / "a", slots):
        pass


def test_an_adapter_of_another_base_is_refused_and_nothing_written(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    other = tiny_model(seed=1)
    before = logits(other)
    with pytest.raises(esft.InputError, match="made from another base"):
        esft.load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"), "experts.5.up_proj.weight is missing"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(1)}), "model.extra.weight belongs to nothing selected"),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.zeros(20, 31)}),
            r"has shape \(20, 31\), the base has \(20, 32\)",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(20, 32, dtype=torch.int8)}),
            "experts.0.up_proj.weight is I8, not floating point",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(20, 32, dtype=torch.bool)}),
            "experts.0.up_proj.weight is BOOL, not floating point",
        ),
        (
            lambda t: t.update({"layers.2.mlp.experts.0.up_proj.weight": torch.zeros(20, 32)}),
            "holds tensor model.layers.2.mlp.experts.0.up_proj.weight twice",
        ),
    ],
)
def test_a_missing_extra_misshapen_integer_or_doubled_tensor_is_named(tmp_path, change, message: str):
    esft.save_adapter(tuned(), tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    model = tiny_model()
    before = logits(model)
    with pytest.raises(esft.InputError, match=message):
        esft.load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), before)


def test_a_truncated_file_and_a_pickle_are_refused(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(esft.InputError, match="not a readable safetensors file"):
        esft.load_adapter(tiny_model(), tmp_path / "a")
    torch.save({}, path)
    with pytest.raises(esft.InputError, match="not a readable safetensors file"):
        esft.load_adapter(tiny_model(), tmp_path / "a")


def test_an_unknown_format_and_an_incomplete_folder_are_refused(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(esft.InputError, match="format_version must be 1"):
        esft.load_adapter(tiny_model(), tmp_path / "a")
    (tmp_path / "a" / "expert_cfg.json").unlink()
    with pytest.raises(esft.InputError, match="no expert_cfg.json"):
        esft.load_adapter(tiny_model(), tmp_path / "a")


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"0": [1]}, r"names layer 0; the model's MoE layers are \[1, 2\]"),
        ({"2": [8]}, r"names experts \[8\] of layer 2, which has 8"),
        ({"2": [-1]}, r"names experts \[-1\] of layer 2"),
        ({"2": [1, 1]}, "layer 2 names an expert twice"),
    ],
)
def test_a_selection_that_does_not_fit_is_named_with_its_file(tmp_path, experts, message: str):
    esft.save_adapter(tuned(), tmp_path / "a")
    base = save_tiny(tmp_path / "base")
    (tmp_path / "a" / "expert_cfg.json").write_text(json.dumps({"experts": experts}))
    with pytest.raises(esft.InputError, match=f"a/expert_cfg.json: .*{message}"):
        esft.load_adapter(tiny_model(), tmp_path / "a")
    with pytest.raises(esft.InputError, match=f"a/expert_cfg.json: .*{message}"):
        esft.merge(base, tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_in_use_and_a_stock_model_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("keep")
    with pytest.raises(esft.InputError, match="holds something already"):
        esft.save_adapter(tuned(), tmp_path / "a")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["precious"]
    with pytest.raises(esft.InputError, match="holds no earlier adapter"):
        esft.save_adapter(tuned(), tmp_path / "a", overwrite=True)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["precious"]
    for overwrite in (False, True):
        esft.save_adapter(tuned(), tmp_path / "c", overwrite)
    with pytest.raises(esft.InputError, match="only a swapped model"):
        esft.save_adapter(tiny_model(), tmp_path / "b")


def test_a_model_whose_weights_are_elsewhere_is_refused(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    model = tiny_model()
    model.model.embed_tokens.to("meta")
    for touch in (lambda: esft.load_adapter(model, tmp_path / "a"), lambda: esft.swap(model, ExpertSelection({}))):
        with pytest.raises(esft.InputError, match="embed_tokens.weight: the weights are not in memory"):
            touch()


def test_what_another_library_put_into_trained_modules_is_not_saved_as_theirs(tmp_path):
    model = tuned(non_expert_modules=True)
    both = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(esft.InputError, match=r"q_proj\.base_layer\.weight: is not of the model that was swapped"):
        esft.save_adapter(model, tmp_path / "a")
    both.unload()
    esft.save_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(esft.load_adapter(tiny_model(), tmp_path / "a")), logits(model))


def test_only_a_model_of_transformers_is_one():
    check_model(tiny_model())
    with pytest.raises(esft.InputError, match="^Linear is no transformers model"):
        check_model(torch.nn.Linear(1, 1))


def test_a_wrapped_model_is_refused(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    compiled = torch.compile(tuned(), backend="eager")
    for touch in (
        lambda: esft.save_adapter(compiled, tmp_path / "b"),
        lambda: esft.load_adapter(compiled, tmp_path / "a"),
        lambda: esft.set_adapter(compiled, "a"),
    ):
        with pytest.raises(esft.InputError, match="OptimizedModule is no transformers model; .* unwrapped"):
            touch()
    assert not (tmp_path / "b").exists()


def save_small(folder, dtype: torch.dtype):
    """A base whose values are so small that float16 does not keep all of their bits."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trained", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_trained_in_another_dtype_fits_its_base(tmp_path, stored: torch.dtype, trained: str):
    base = save_small(tmp_path / "base", stored)
    model = esft.swap(load_model(str(base), trained), ExpertSelection({1: [0]}))
    esft.save_adapter(model, tmp_path / "a")
    esft.load_adapter(load_model(str(base)), tmp_path / "a")
    esft.load_adapter(load_model(str(base)), tmp_path / "a", name="a")
    esft.merge(base, tmp_path / "a", tmp_path / "merged")


def test_where_float16_hides_whether_a_base_is_the_same_the_error_says_so(tmp_path):
    base = save_small(tmp_path / "base", torch.bfloat16)
    for trained, loaded in (("bfloat16", "float16"), ("float16", "bfloat16")):
        model = esft.swap(load_model(str(base), trained), ExpertSelection({1: [0]}))
        esft.save_adapter(model, tmp_path / "a", overwrite=True)
        other = load_model(str(base), loaded)
        if trained == "float16":  # and what it was before the swap is not kept
            esft.swap(other, ExpertSelection({1: [0]}))
        with pytest.raises(esft.InputError, match=f"another base.* trained in {trained} and these are in {loaded}"):
            esft.load_adapter(other, tmp_path / "a")
