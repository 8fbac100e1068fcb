import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import esft
from esft.checkpoint.digest import model_digest
from esft.experts.model_state import Adapters, model_state
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from tests.esft import zoo
from tests.esft.models import save_tiny, tiny_model, token_batch


def adapters_of(model) -> Adapters:
    adapters = model_state(model).adapters
    assert adapters is not None
    return adapters


def logits(model) -> torch.Tensor:
    return model(**token_batch()).logits


def saved(tmp_path, name: str, selection: ExpertSelection, scale: float) -> torch.Tensor:
    """Write an adapter and return its logits."""
    model = esft.swap(tiny_model(), selection)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(scale)
    esft.save_adapter(model, tmp_path / name)
    return logits(model)


@pytest.mark.parametrize("swapped", [False, True])
def test_adapters_are_switched_on_one_base_and_the_base_comes_back(tmp_path, swapped: bool):
    one = saved(tmp_path, "one", ExpertSelection({1: [5, 2]}), 1.5)
    two = saved(tmp_path, "two", ExpertSelection({1: [2], 2: [0]}, shared_experts=True), -0.5)
    model = tiny_model()
    if swapped:
        esft.swap(model, ExpertSelection({1: [2, 7]}))
    base = logits(model)
    for name in ("one", "two"):
        esft.load_adapter(model, tmp_path / name, name=name)
    assert torch.equal(logits(model), base)
    for name, expected in (("one", one), ("two", two), ("one", one)):
        torch.testing.assert_close(logits(esft.set_adapter(model, name)), expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(logits(esft.set_adapter(model, None)), base)


def test_what_was_trained_of_an_adapter_stays_under_its_name(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    model = esft.swap(tiny_model(), ExpertSelection({1: [5]}))
    base = logits(model)
    esft.load_adapter(model, tmp_path / "one", name="one")
    esft.set_adapter(model, "one")
    with torch.no_grad():
        moe_layers(model)[0].experts.trained_down_proj.mul_(2)
    trained = logits(model)
    assert torch.equal(logits(esft.set_adapter(model, None)), base)
    assert torch.equal(logits(esft.set_adapter(model, "one")), trained)


def test_a_float32_adapter_keeps_its_precision_when_a_bfloat16_model_switches(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.1)
    model = tiny_model(dtype=torch.bfloat16)
    esft.load_adapter(model, tmp_path / "one", name="one")
    esft.set_adapter(model, "one")
    slot = "model.layers.1.mlp.experts.5.down_proj.weight"
    with torch.no_grad():
        moe_layers(model)[0].experts.down_proj[5].mul_(2)
    esft.set_adapter(model, None)
    before = load_file(tmp_path / "one" / "adapter.safetensors")
    for name, tensor in adapters_of(model).held["one"][1].items():
        assert torch.equal(tensor, 2 * before[name].bfloat16() if name == slot else before[name])


def test_the_model_itself_comes_back_and_without_adapters_it_has_its_base_set(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    model = tiny_model()
    assert esft.set_adapter(model, None) is model
    assert esft.load_adapter(model, str(tmp_path / "one"), name="one") is model
    assert esft.set_adapter(model, None) is model
    assert esft.set_adapter(model, "one") is model
    other = tiny_model()
    assert esft.load_adapter(other, str(tmp_path / "one")) is other


def test_setting_what_is_set_touches_nothing(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    model = esft.load_adapter(tiny_model(), tmp_path / "one", name="one")
    for name in (None, "one"):
        esft.set_adapter(model, name)
        versions = [parameter._version for parameter in model.parameters()]  # counts what is written in place
        esft.set_adapter(model, name)
        assert [parameter._version for parameter in model.parameters()] == versions
        assert adapters_of(model).active == name


def test_an_adapter_is_held_under_a_name_while_another_is_set(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    two = saved(tmp_path, "two", ExpertSelection({1: [5], 2: [0]}), -0.5)
    model = tiny_model()
    base = logits(model)
    esft.set_adapter(esft.load_adapter(model, tmp_path / "one", name="one"), "one")
    one = logits(model)
    esft.load_adapter(model, tmp_path / "two", name="two")
    assert torch.equal(logits(model), one)
    torch.testing.assert_close(logits(esft.set_adapter(model, "two")), two, atol=2e-6, rtol=1e-5)
    assert torch.equal(logits(esft.set_adapter(model, None)), base)


def test_a_swapped_model_that_has_been_trained_is_still_of_its_base(tmp_path):
    one = saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    model = esft.swap(tiny_model(), ExpertSelection({1: [5]}))
    with torch.no_grad():
        moe_layers(model)[0].experts.trained_down_proj.mul_(2)
    torch.testing.assert_close(logits(esft.load_adapter(model, tmp_path / "one")), one, atol=2e-6, rtol=1e-5)


def test_a_base_that_came_back_is_free_of_what_was_set(tmp_path):
    """Then an adapter of other experts can be saved, and the model can be swapped."""
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    model = esft.load_adapter(esft.swap(tiny_model(), ExpertSelection({2: [0]})), tmp_path / "one", name="one")
    esft.set_adapter(esft.set_adapter(model, "one"), None)
    assert adapters_of(model).base == {}
    esft.save_adapter(model, tmp_path / "two")
    esft.swap(esft.unswap(model), ExpertSelection({1: [5]}))


def test_a_wrapped_model_is_refused(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    wrapped = torch.nn.Sequential(tiny_model())
    for touch in (lambda: esft.load_adapter(wrapped, tmp_path / "one"), lambda: esft.set_adapter(wrapped, None)):
        with pytest.raises(esft.InputError, match="^Sequential is no transformers model"):
            touch()


@pytest.mark.parametrize("state", ["stock", "swapped", "named"])
def test_the_base_is_rounded_to_float16_only_where_it_can_still_be_read(tmp_path, monkeypatch, state: str):
    """A swapped model may have been trained since, and one with adapters have one of them set."""
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    shutil.copytree(tmp_path / "one", tmp_path / "half")
    manifest = json.loads((tmp_path / "half" / "manifest.json").read_text())
    manifest |= {"base_dtype": "float16", "base_digest": model_digest(tiny_model(), torch.float16)}
    assert manifest["base_digest"] != model_digest(tiny_model())
    (tmp_path / "half" / "manifest.json").write_text(json.dumps(manifest))
    model = tiny_model()
    if state == "swapped":
        esft.swap(model, ExpertSelection({1: [5]}))
    elif state == "named":
        esft.set_adapter(esft.load_adapter(model, tmp_path / "one", name="one"), "one")
    asked = []
    monkeypatch.setattr(
        "esft.checkpoint.digest.model_digest", lambda model, to=None: asked.append(to) or model_digest(model, to)
    )
    name = "half" if state == "named" else None
    if state == "stock":
        esft.load_adapter(model, tmp_path / "half")
    else:
        with pytest.raises(esft.InputError, match=r"another base.* trained in float16 and these are in float32"):
            esft.load_adapter(model, tmp_path / "half", name)
    # A set adapter's tensors might be the base of this one, which is looked at after the base itself.
    assert asked == {"stock": [torch.float16, None], "swapped": [], "named": [torch.float16, None]}[state]


def test_names_that_are_taken_or_unknown_and_a_swap_over_an_adapter_are_refused(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    model = tiny_model()
    with pytest.raises(esft.InputError, match=r"holds no adapter named 'one'; it holds \[\]"):
        esft.set_adapter(model, "one")
    esft.load_adapter(model, tmp_path / "one", name="one")
    with pytest.raises(esft.InputError, match=r"/one: the model holds an adapter named 'one' already$"):
        esft.load_adapter(model, tmp_path / "one", name="one")
    esft.load_adapter(model, tmp_path / "one", name="another")
    with pytest.raises(esft.InputError, match=r"holds no adapter named 'two'; it holds \['another', 'one'\]$"):
        esft.set_adapter(model, "two")
    assert adapters_of(model).active is None
    esft.set_adapter(model, "one")
    with pytest.raises(esft.InputError, match="has an adapter set"):
        esft.swap(model, ExpertSelection({}))


@pytest.mark.parametrize("swapped", [False, True])
def test_an_adapter_without_a_name_takes_the_place_of_the_one_before_it(tmp_path, swapped: bool):
    one = saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    two = saved(tmp_path, "two", ExpertSelection({2: [0]}), 0.5)
    model = esft.swap(tiny_model(), ExpertSelection({1: [5]})) if swapped else tiny_model()
    base = logits(model)
    for name, expected in (("one", one), ("two", two), ("one", one)):
        torch.testing.assert_close(logits(esft.load_adapter(model, tmp_path / name)), expected, atol=2e-6, rtol=1e-5)
    assert (adapters_of(model).active, list(adapters_of(model).held)) == ("default", ["default"])
    assert torch.equal(logits(esft.set_adapter(model, None)), base)
    torch.testing.assert_close(logits(esft.set_adapter(model, "default")), one, atol=2e-6, rtol=1e-5)


def test_adapters_with_and_without_a_name_are_switched_on_one_base(tmp_path):
    one = saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    two = saved(tmp_path, "two", ExpertSelection({2: [0]}), 0.5)
    model = esft.load_adapter(tiny_model(), tmp_path / "one", name="one")
    esft.set_adapter(model, "one")
    esft.load_adapter(model, tmp_path / "two")
    torch.testing.assert_close(logits(model), two, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(logits(esft.set_adapter(model, "one")), one, atol=2e-6, rtol=1e-5)
    with pytest.raises(esft.InputError, match="/two: the model holds an adapter named 'default' already$"):
        esft.load_adapter(model, tmp_path / "two", name="default")


def test_a_refused_adapter_leaves_the_one_that_is_set(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    saved(tmp_path, "two", ExpertSelection({2: [0]}), 0.5)
    (tmp_path / "two" / "adapter.safetensors").write_bytes(b"no")
    model = esft.load_adapter(tiny_model(), tmp_path / "one")
    before = logits(model)
    with pytest.raises(esft.InputError, match="not a readable safetensors file"):
        esft.load_adapter(model, tmp_path / "two")
    assert torch.equal(logits(model), before) and adapters_of(model).active == "default"


def test_a_swap_makes_default_a_part_of_the_base_but_not_beside_others(tmp_path):
    one = saved(tmp_path, "one", ExpertSelection({1: [5]}), 1.5)
    model = esft.load_adapter(tiny_model(), tmp_path / "one")
    digest = model_digest(model)
    esft.swap(model, ExpertSelection({2: [0]}))
    state = model_state(model)
    assert state.swapped is not None and state.swapped.base.digest == digest
    assert state.adapters is None and len(state.settled) == 3
    torch.testing.assert_close(logits(esft.unswap(model)), one, atol=2e-6, rtol=1e-5)
    beside = esft.load_adapter(esft.load_adapter(tiny_model(), tmp_path / "one"), tmp_path / "one", name="one")
    with pytest.raises(esft.InputError, match="has an adapter set"):
        esft.swap(beside, ExpertSelection({}))


@pytest.mark.parametrize("name", [None, "one"])
def test_what_a_loaded_adapter_wrote_is_saved_whole_or_refused(tmp_path, name: str | None):
    expected = saved(tmp_path, "one", ExpertSelection({1: [2, 5]}), 1.5)
    for selection in (ExpertSelection({1: [5]}), ExpertSelection({1: [5, 2, 0]})):
        model = esft.load_adapter(esft.swap(tiny_model(), selection), tmp_path / "one", name)
        if name is not None:
            esft.set_adapter(model, name)
        if len(selection.experts[1]) == 1:
            with pytest.raises(esft.InputError, match=r"changed model\.layers\.1\.mlp\.experts\.2.*incomplete"):
                esft.save_adapter(model, tmp_path / "again")
            assert not (tmp_path / "again").exists()
        else:
            esft.save_adapter(model, tmp_path / "again")
            again = esft.load_adapter(tiny_model(), tmp_path / "again")
            torch.testing.assert_close(logits(again), expected, atol=2e-6, rtol=1e-5)


def published(tmp_path, prefix: bool, files: int):
    """An adapter as the method's authors publish them: no manifest, other file names, perhaps no ``model.``."""
    expected = saved(tmp_path, "ours", ExpertSelection({1: [5, 2], 2: [0]}), 1.5)
    tensors = load_file(tmp_path / "ours" / "adapter.safetensors")
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "expert_cfg.json").write_bytes((tmp_path / "ours" / "expert_cfg.json").read_bytes())
    names = sorted(tensors)
    for i in range(files):
        part = {name if prefix else name.removeprefix("model."): tensors[name] for name in names[i::files]}
        save_file(part, folder / f"model-{i + 1:05}-of-{files:05}.safetensors")
    return folder, expected


@pytest.mark.parametrize(("prefix", "files"), [(True, 1), (False, 1), (False, 3)])
def test_a_published_adapter_loads_and_merges_and_its_base_is_not_vouched_for(tmp_path, prefix: bool, files: int):
    folder, expected = published(tmp_path, prefix, files)
    model = tiny_model()
    with pytest.warns(UserWarning, match="does not say which base it is of"):
        esft.load_adapter(model, folder)
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    base = save_tiny(tmp_path / "base")
    with pytest.warns(UserWarning, match="does not say which base it is of"):
        esft.merge(base, folder, tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    changed = {n for n, t in load_file(tmp_path / "merged" / "model.safetensors").items() if not t.equal(before[n])}
    assert changed == load_file(tmp_path / "ours" / "adapter.safetensors").keys()


@pytest.mark.filterwarnings("ignore:.*does not say which base")
@pytest.mark.parametrize("then", ["swap", "swap, unswap"])
def test_a_published_adapter_does_not_stack_on_one_that_is_a_part_of_the_base(tmp_path, then: str):
    for name, selection in (("one", {1: [5]}), ("wide", {1: [2, 5], 2: [0]}), ("two", {2: [0]})):
        saved(tmp_path, name, ExpertSelection(selection), 0.5)
        (tmp_path / name / "manifest.json").unlink()
    model = esft.swap(esft.load_adapter(tiny_model(), tmp_path / "one"), ExpertSelection({1: [5]}))
    if "unswap" in then:
        esft.unswap(model)
    before = logits(model)
    name = r"model\.layers\.1\.mlp\.experts\.5\.down_proj\.weight"
    for called in (None, "two"):
        with pytest.raises(esft.InputError, match=rf"/two: does not cover {name} \(3 such in all\), which an adapter"):
            esft.load_adapter(model, tmp_path / "two", called)
    assert torch.equal(logits(model), before)
    esft.load_adapter(model, tmp_path / "wide")
    expected = logits(esft.load_adapter(tiny_model(), tmp_path / "wide"))
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


def test_an_adapter_trained_on_top_of_a_loaded_one_loads_on_top_of_it_and_counts_as_both(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 0.5)
    both = esft.swap(esft.load_adapter(tiny_model(), tmp_path / "one"), ExpertSelection({2: [0]}))
    with torch.no_grad():
        moe_layers(both)[1].experts.trained_down_proj.mul_(2)
    esft.save_adapter(both, tmp_path / "top")
    model = esft.load_adapter(esft.load_adapter(tiny_model(), tmp_path / "one"), tmp_path / "top")
    torch.testing.assert_close(logits(model), logits(both), atol=2e-6, rtol=1e-5)
    (tmp_path / "top" / "manifest.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(esft.InputError, match=r"does not cover model\.layers\.1"):
        esft.load_adapter(model, tmp_path / "top")


def test_a_published_adapter_without_safetensors_or_of_another_shape_is_refused(tmp_path):
    folder, _ = published(tmp_path, prefix=False, files=1)
    other = zoo.tiny("qwen3_moe")
    with pytest.warns(UserWarning), pytest.raises(esft.InputError, match="selection names layer 2"):
        esft.load_adapter(other, folder)
    (folder / "expert_cfg.json").write_text(json.dumps({"experts": {"1": [5]}}))
    with pytest.warns(UserWarning), pytest.raises(esft.InputError, match=r"experts\.2\..* belongs to nothing selected"):
        esft.load_adapter(tiny_model(), folder)
    next(folder.glob("*.safetensors")).rename(folder / "pytorch_model.bin")
    with pytest.warns(UserWarning), pytest.raises(esft.InputError, match="pickled weights are never loaded"):
        esft.load_adapter(tiny_model(), folder)


def test_an_adapter_on_top_of_a_loaded_one_is_refused_where_others_are_held_beside_that(tmp_path):
    saved(tmp_path, "one", ExpertSelection({1: [5]}), 0.5)
    both = esft.swap(esft.load_adapter(tiny_model(), tmp_path / "one"), ExpertSelection({2: [0]}))
    esft.save_adapter(both, tmp_path / "top")
    model = esft.load_adapter(tiny_model(), tmp_path / "one", name="other")
    esft.load_adapter(model, tmp_path / "one")
    before = logits(model)
    with pytest.raises(esft.InputError, match="/top: made from another base"):
        esft.load_adapter(model, tmp_path / "top")
    assert torch.equal(logits(model), before)
