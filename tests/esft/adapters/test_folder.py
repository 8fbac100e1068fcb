import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

import esft
from esft.adapters.folder import (
    adapter_weights,
    check_base,
    check_finite,
    check_model,
    difference,
    open_adapter,
    open_manifest,
    selected_tensors,
)
from esft.checkpoint.adapter_tensors import AdapterTensor, adapter_tensors
from esft.checkpoint.load import load_model
from esft.checkpoint.views import StoredTensor
from esft.experts.model_state import Base, known_state
from esft.selection import ExpertSelection
from tests.esft.adapters.tuned import logits, tuned
from tests.esft.checkpoint.files import rewrite_json
from tests.esft.models import save_tiny, tiny_model


def base_of(digest: str, dtype: torch.dtype | None = torch.float32, settings: dict | None = None) -> Base:
    return Base("tiny", digest, dtype, settings or {})


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
    ours, theirs = (base_of(digest, dtype) for digest in ("0123456789abcdef", "fedcba9876543210"))
    manifest = {"base_model": "tiny", "base_digest": theirs.digest} | manifest
    check_base(manifest, lambda rounded: theirs, "x/a")
    with pytest.raises(esft.InputError) as raised:
        check_base(manifest, lambda rounded: ours, "x/a")
    expected = (
        "x/a: made from another base (tiny, digest fedcba987654), not from these weights (0123456789ab)"
        + "; it was trained in float32 and these are in bfloat16: load its base in float32" * hint
    )
    assert str(raised.value) == expected


@pytest.mark.parametrize(
    ("version", "theirs", "ours", "shown"),
    [
        (2, "a" * 64 + "-" + "b" * 32, "a" * 64 + "-" + "c" * 32, ("b" * 12, "c" * 12)),
        (2, "a" * 64, "a" * 64 + "-" + "c" * 32, ("none", "c" * 12)),
        (1, "a" * 64 + "-" + "b" * 32, "a" * 64 + "-" + "c" * 32, ("b" * 12, "none")),
        (2, "d" * 64 + "-" + "b" * 32, "a" * 64 + "-" + "b" * 32, ("d" * 12, "a" * 12)),
    ],
)
def test_of_two_digests_the_part_is_shown_that_differs(version: int, theirs: str, ours: str, shown: tuple[str, str]):
    why = difference({"format_version": version, "base_digest": theirs, "base_model": "m"}, lambda _: base_of(ours))
    assert why == f"made from another base (m, digest {shown[0]}), not from these weights ({shown[1]})"


def test_a_message_does_not_grow_with_the_manifest(tmp_path):
    manifest = {"base_digest": "x" * 9000, "base_model": "y" * 9000, "base_settings": {"a": "z" * 9000}}
    assert len(difference(manifest, lambda _: base_of("a")) or "") < 300
    named = manifest | {"base_digest": "a"}
    assert len(difference(named, lambda _: base_of("a", settings={"a": 1})) or "") < 300


def test_a_manifest_without_a_digest_is_of_another_base():
    with pytest.raises(esft.InputError, match=r"another base \(None, digest None\)"):
        check_base({}, lambda rounded: base_of("0123456789abcdef"), "a")


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
def test_only_an_adapter_trained_in_float16_is_held_to_the_rounded_base_too(base_dtype, base_digest, fits):
    manifest = {"format_version": 2, "base_digest": base_digest, "base_dtype": base_dtype}
    bases = {None: base_of("plain"), torch.float16: base_of("rounded")}
    assert (difference(manifest, bases.__getitem__) is None) is fits
    if not fits:
        with pytest.raises(esft.InputError, match=r"^x/a: made from another base .*\(plain\)"):
            check_base(manifest, bases.__getitem__, "x/a")


@pytest.mark.parametrize(
    ("version", "base_digest", "fits"),
    [(1, "some", True), (1, "some-every", False), (1, "other", False), (2, "some-every", True), (2, "some", False)],
)
def test_an_adapter_of_the_first_version_is_held_to_the_first_part_of_the_digest(version, base_digest, fits):
    manifest = {"format_version": version, "base_digest": base_digest, "base_dtype": "float32"}
    assert (difference(manifest, lambda rounded: base_of("some-every")) is None) is fits


@pytest.mark.parametrize("version", [1, 2])
def test_a_base_that_computes_otherwise_is_told_by_the_setting(version: int):
    settings = {"num_experts_per_tok": 3, "of_this_version": 2}
    manifest = {"format_version": version, "base_digest": "a", "base_settings": settings | {"of_another_version": 1}}
    base = base_of("a", settings=settings)
    assert difference(manifest, lambda rounded: base) is None
    assert difference({"format_version": version, "base_digest": "a"}, lambda rounded: base) is None
    other = base_of("a", settings=settings | {"num_experts_per_tok": 1})
    why = "made from a base with num_experts_per_tok 3; this model has 1"
    assert difference(manifest, lambda rounded: other) == why


def test_a_base_with_another_setting_is_refused_by_load_and_merge_with_nothing_written(tmp_path):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(esft.swap(load_model(str(base)), ExpertSelection({1: [5]})), tmp_path / "a")
    rewrite_json(base / "config.json", lambda config: config.update(num_experts_per_tok=1))
    model = load_model(str(base))
    with pytest.raises(esft.InputError, match="/a: made from a base with num_experts_per_tok 3; this model has 1"):
        esft.load_adapter(model, tmp_path / "a")
    with pytest.raises(esft.InputError, match="/a: made from a base with num_experts_per_tok 3; this model has 1"):
        esft.merge(base, tmp_path / "a", tmp_path / "out")
    assert known_state(model).adapters is None and not (tmp_path / "out").exists()


def test_an_adapter_without_a_manifest_is_taken_with_a_warning(tmp_path):
    (tmp_path / "expert_cfg.json").write_text("")

    def merging():
        return open_adapter(tmp_path)

    said = rf"^{tmp_path}: does not say which base it is of \(no manifest\.json\); only"
    with pytest.warns(UserWarning, match=said) as warned:
        assert merging() == {}
    here = inspect.currentframe()
    assert here is not None
    assert (warned[0].filename, warned[0].lineno) == (__file__, here.f_lineno - 3)  # who called what calls it
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(esft.InputError, match=r"/manifest\.json: Is a directory$"):
        open_adapter(tmp_path)
    (tmp_path / "expert_cfg.json").unlink()
    (tmp_path / "expert_cfg.json").mkdir()
    with pytest.raises(esft.InputError, match=rf"^{tmp_path}: not an adapter folder \(no expert_cfg\.json\)$"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    ("content", "version"),
    [("[1]", None), ("{}", None), ('{"format_version": 3}', 3), ('{"format_version": true}', True),
     ('{"format_version": 1.0}', 1.0)],
)  # fmt: skip
def test_a_manifest_of_another_format_is_refused(tmp_path, content: str, version: object):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(esft.InputError, match=rf"/manifest\.json: format_version must be 1 or 2, got {version}$"):
        open_manifest(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, r"names no base \(no base_digest\)"),
        ({"base_digest": 7}, "base_digest is 7"),
        ({"base_digest": "a", "base_dtype": []}, r"base_dtype is \[\]"),
        ({"base_digest": "a", "base_model": None}, "base_model is None"),
        ({"base_digest": "a", "chosen_by": "me"}, "chosen_by is 'me'"),
    ],
)
def test_a_manifest_says_what_it_says_in_its_own_kinds(tmp_path, more: dict, message: str):
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1} | more))
    with pytest.raises(esft.InputError, match=rf"/manifest\.json: {message}$"):
        open_manifest(tmp_path)


def test_a_tensor_without_numbers_is_named():
    check_finite(torch.tensor([1.0, 65504.0], dtype=torch.float16), "t")
    check_finite(torch.tensor([1, 2]), "t")
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with pytest.raises(esft.InputError, match="^t holds values that are infinite or no numbers$"):
                check_finite(torch.tensor([1.0, value], dtype=dtype), "t")


def test_a_selection_is_read_with_its_switches_and_held_to_the_model(tmp_path):
    chosen = ExpertSelection({1: [7]}, shared_experts=True, non_expert_modules=True)
    chosen.save(tmp_path / "expert_cfg.json")
    selection, tensors = selected_tensors(tmp_path, model := tiny_model())
    assert selection == chosen
    assert tensors.keys() == adapter_tensors(model, chosen).keys()
    ExpertSelection({1: [8]}).save(tmp_path / "expert_cfg.json")
    message = rf"^{tmp_path}/expert_cfg.json: selection names experts \[8\] of layer 1, which has 8 experts$"
    with pytest.raises(esft.InputError, match=message):
        selected_tensors(tmp_path, model)


ONE = "model.layers.1.mlp.experts.1.{}_proj.weight"


def files_of(folder, *parts: dict) -> dict:
    """What one expert's tensors are in a model, and a folder with files of tensors."""
    folder.mkdir()
    for number, tensors in enumerate(parts):
        save_file(tensors, folder / f"model-{number}.safetensors")
    return adapter_tensors(tiny_model(), ExpertSelection({1: [1]}))


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
    slots = {name: AdapterTensor(StoredTensor(name, None, (3,), ()), ()) for name in tensors}
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
        (
            [one_expert(), {ONE.format("up").removeprefix("model."): torch.zeros(20, 32)}],
            rf"holds tensor {ONE.format('up')} twice",
        ),
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
        # By the name that the file has for it.
        (
            [{name.removeprefix("model."): t for name, t in one_expert(up=torch.zeros(640)).items()}],
            rf"tensor {ONE.format('up').removeprefix('model.')} has shape",
        ),
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
    ("experts", "message"),
    [
        ({"0": [1]}, r"names layer 0; the model's MoE layers are \[1, 2\]"),
        ({"2": [8]}, r"names experts \[8\] of layer 2, which has 8"),
        ({"2": [-1]}, "layer 2 names an expert -1"),
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


def test_only_a_model_of_transformers_is_one():
    check_model(tiny_model())
    with pytest.raises(esft.InputError, match="^Linear is no transformers model"):
        check_model(torch.nn.Linear(1, 1))


def save_small(folder, dtype: torch.dtype):
    """A base whose values are so small that float16 does not keep all of their bits."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    model.to(dtype).save_pretrained(folder)
    return folder


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


def test_a_tensor_is_read_only_where_it_holds_numbers(tmp_path):
    slots = files_of(tmp_path / "a", one_expert(up=torch.full((20, 32), torch.inf)))
    with adapter_weights(tmp_path / "a", slots) as weights:
        weights.get_tensor(ONE.format("down"))
        with pytest.raises(
            esft.InputError, match=f"^adapter's tensor {ONE.format('up')} holds values that are infinite"
        ):
            weights.get_tensor(ONE.format("up"))


def test_a_manifest_that_cannot_be_read_is_no_missing_one(tmp_path):
    (tmp_path / "expert_cfg.json").touch()
    (tmp_path / "manifest.json").symlink_to("nowhere")
    with pytest.raises(esft.InputError, match=r"/manifest\.json: No such file or directory$"):
        open_adapter(tmp_path)
