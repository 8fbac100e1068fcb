import importlib
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import esft
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model
from esft.errors import DiskError, InputError
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from esft.storage.files import TensorInfo
from tests.esft.adapters.tuned import tune
from tests.esft.checkpoint.files import rewrite
from tests.esft.models import FAMILIES, save_tiny, tiny_model, token_batch


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_checkpoint_has_the_swapped_models_logits(tmp_path, family: str, dtype: torch.dtype):
    base = save_tiny(tmp_path / "base", family, dtype=dtype)
    model = tune(base, ExpertSelection({2: [5, 0]}))
    esft.save_adapter(model, tmp_path / "a")
    esft.merge(base, tmp_path / "a", tmp_path / "merged")
    # 16-bit weights are exact in float32, so the comparison holds to float32's own rounding.
    expected = model.float()(**token_batch()).logits
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (stock(**token_batch()).logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    # Through the same kernels, in the same order of experts, not a bit differs.
    esft.swap(stock, ExpertSelection({2: [5, 0]}))
    assert torch.equal(stock(**token_batch()).logits, expected)


def test_weights_are_copied_whatever_their_files_are_called(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base", max_shard_size="200KB")
    base = tmp_path / "base"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for file in list(base.glob("*.safetensors")):
        file.rename(file.with_name(f"consolidated-{file.name}"))
    index["weight_map"] = {name: f"consolidated-{file}" for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "consolidated-more.safetensors").write_text("not in the index")
    chosen = ExpertSelection({1: [3], 2: [5]})
    esft.save_adapter(tune(base, chosen), tmp_path / "a")
    esft.merge(base, tmp_path / "a", tmp_path / "merged")
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert found == {path.name for path in base.iterdir()} - {"consolidated-more.safetensors"} | {"esft_manifest.json"}
    expected = esft.unswap(tune(base, chosen)).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in load_model(str(tmp_path / "merged")).state_dict().items())


def test_other_tensors_and_files_stay_as_they_are_in_every_shard(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    base = tmp_path / "base"
    assert len(list(base.glob("*.safetensors"))) > 2
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    esft.merge(base, tmp_path / "a", tmp_path / "merged")
    changed = set()
    for file in sorted(base.iterdir()):
        other = tmp_path / "merged" / file.name
        if file.suffix != ".safetensors":
            assert other.read_bytes() == file.read_bytes()
            continue
        before, after = load_file(file), load_file(other)
        assert before.keys() == after.keys()
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.1.mlp.experts.3.{p}_proj.weight" for p in ("gate", "up", "down")}


def test_an_adapter_of_another_base_or_of_one_that_lacks_a_tensor_is_refused_and_no_output_appears(tmp_path):
    base, other = save_tiny(tmp_path / "base"), save_tiny(tmp_path / "other", seed=1)
    half = save_tiny(tmp_path / "half", seed=1, dtype=torch.bfloat16)
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    rewrite(base, lambda tensors: tensors.pop("model.norm.weight"))
    for model, said in (
        (other, r"made from another base .*, not from these weights \(\w+\)$"),
        (half, r"another base .*; it was trained in float32 and these are in bfloat16: load its base in float32$"),
        (base, r"/base: tensor model\.norm\.weight is missing$"),
    ):
        with pytest.raises(esft.InputError, match=said):
            esft.merge(model, tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_output_that_holds_something_stays_until_overwritten(tmp_path):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    with pytest.raises(esft.InputError, match="holds something already"):
        esft.merge(tmp_path / "absent", tmp_path / "a", tmp_path / "out")  # before anything is read
    assert (tmp_path / "out" / "precious").exists()
    with pytest.raises(esft.InputError, match="holds no earlier merge"):
        esft.merge(tmp_path / "absent", tmp_path / "a", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious").exists()
    esft.merge(base, tmp_path / "a", tmp_path / "merged")
    first = {path: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    (tmp_path / "merged" / "model.safetensors").write_text("")  # of the merge, whatever became of it
    esft.merge(base, tmp_path / "a", tmp_path / "merged", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == first


@pytest.mark.parametrize("mine", ["thesis.tex", "notes/thesis.tex", ".hidden", "model-00001-of-00002.safetensors"])
def test_a_merge_that_holds_a_users_file_is_not_overwritten(tmp_path, mine: str):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    merged = esft.merge(base, tmp_path / "a", tmp_path / "merged")
    (merged / mine).parent.mkdir(exist_ok=True)
    (merged / mine).write_text("years of work")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"merged: holds {mine}, which is no part of what is overwritten; move"):
        esft.merge(base, tmp_path / "a", merged, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ["{}", "[]", '{"files": "all"}', '{"files": [1]}'])
def test_a_merge_that_does_not_say_what_it_consists_of_is_not_overwritten(tmp_path, content: str):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    merged = esft.merge(base, tmp_path / "a", tmp_path / "merged")
    (merged / "esft_manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"esft_manifest\.json: does not say which files are of the merge"):
        esft.merge(base, tmp_path / "a", merged, overwrite=True)
    assert len(list(merged.iterdir())) == len(list(base.iterdir())) + 1


def test_an_output_that_would_replace_an_input_is_refused(tmp_path):
    base = save_tiny(tmp_path / "work" / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "work" / "run" / "adapter")
    before = sorted(tmp_path.rglob("*"))
    for out in ("work", "work/base", "work/run", "work/run/adapter"):
        with pytest.raises(esft.InputError, match="would replace"):
            esft.merge(base, tmp_path / "work" / "run" / "adapter", tmp_path / out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("lacks", ["shared_experts.up_proj", "self_attn.q_proj", "experts.3.gate_proj"])
def test_an_adapter_that_lacks_a_tensor_is_refused(tmp_path, lacks: str):
    base = save_tiny(tmp_path / "base")
    selection = ExpertSelection({1: [3]}, shared_experts=True, non_expert_modules=True)
    esft.save_adapter(tune(base, selection), tmp_path / "a")
    esft.merge(base, tmp_path / "a", tmp_path / "whole")
    path = tmp_path / "a" / "adapter.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if lacks in name)
    save_file({name: t for name, t in tensors.items() if name != gone}, path)
    with pytest.raises(esft.InputError, match=f"tensor {gone} is missing"):
        esft.merge(base, tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def flip(place: int):
    def change(content: bytearray) -> None:
        content[place] ^= 1

    return change


def damage_copies(monkeypatch, change) -> None:
    """As a disk does that keeps something other than what it was given."""
    copyfile = shutil.copyfile

    def copy(source, target):
        copyfile(source, target)
        if target.suffix == ".safetensors":
            content = bytearray(target.read_bytes())
            change(content)
            target.write_bytes(content)

    monkeypatch.setattr(importlib.import_module("esft.adapters.merge").shutil, "copyfile", copy)


READS_OTHER = r"^model\.safetensors: reads back other bytes than were written"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip(0), READS_OTHER),
        (flip(100_000), READS_OTHER),  # in a tensor before the adapter's
        (flip(-1), READS_OTHER),  # in the last tensor
        (lambda content: content.pop(), READS_OTHER),
        (lambda content: content.append(0), r"^model\.safetensors: is longer than the base's file"),
        (lambda content: content.extend(bytes(50_000)), r"^model\.safetensors: is longer than the base's file"),
    ],
    ids=["first byte", "before", "last byte", "shorter", "longer", "much longer"],
)
@pytest.mark.parametrize("chunk", [None, 999])
def test_a_disk_that_does_not_keep_what_was_written_is_noticed(tmp_path, monkeypatch, change, message, chunk):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    if chunk is not None:
        monkeypatch.setattr(importlib.import_module("esft.adapters.merge"), "CHUNK", chunk)
    esft.merge(base, tmp_path / "a", tmp_path / "sound")
    damage_copies(monkeypatch, change)
    with pytest.raises(DiskError, match=message):
        esft.merge(base, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_tuned_tensor_that_was_not_kept_is_named(tmp_path, monkeypatch, wrong: int, place: int):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    patch = importlib.import_module("esft.adapters.merge")._Patch
    content, written = patch.content, []

    def torn(self, base_bytes, tuned):
        made = bytearray(content(self, base_bytes, tuned))
        written.append(self.changes[0][0])
        if len(written) == wrong + 1:  # the three are written first and compared afterwards
            made[place] ^= 1
        return bytes(made)

    monkeypatch.setattr(patch, "content", torn)
    name = f"model.layers.1.mlp.experts.3.{('down', 'gate', 'up')[wrong]}_proj.weight"  # as they lie in the file
    with pytest.raises(DiskError, match=rf"^model\.safetensors: tensor {name} reads back otherwise than it was"):
        esft.merge(base, tmp_path / "a", tmp_path / "out")
    assert written[:3] == sorted(written[:3])
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    with pytest.raises(esft.InputError, match=r"no config.json"):
        esft.merge(tmp_path / "a", tmp_path / "a", tmp_path / "out")
    with pytest.raises(esft.InputError, match="not an adapter folder"):
        esft.merge(base, base, tmp_path / "out")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(esft.InputError, match="never loaded"):
        esft.merge(base, tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("held", ["both", "second", "two values"])
def test_a_tied_weight_that_the_files_hold_under_a_second_name_stays_tied(tmp_path, held: str):
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (2 if held == "two values" else 1)
    if held == "second":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, {"format": "pt"})
    tuned = esft.swap(load_model(str(tmp_path / "base")), ExpertSelection({1: [3]}, non_expert_modules=True))
    with torch.no_grad():
        tuned.get_input_embeddings().weight.mul_(1.5)
    esft.save_adapter(tuned, tmp_path / "a")
    if held == "two values":  # which the configuration denies
        with pytest.raises(InputError, match=r"lm_head.weight belongs to nothing selected"):
            esft.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
        return
    esft.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"))
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, tuned.lm_head.weight)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == tensors.keys()


LEFT_OUT = """pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json tf_model.h5
tf_model-00001-of-00002.h5 tf_model.h5.index.json flax_model.msgpack flax_model.msgpack.index.json
consolidated.safetensors consolidated.00.pth model-q4.gguf original/consolidated.00.pth original/params.json
additional_chat_templates/more/tools.jinja""".split()


def test_a_base_of_links_into_a_cache_is_copied_without_its_weights_in_other_formats(tmp_path):
    plain = save_tiny(tmp_path / "plain")
    (plain / "additional_chat_templates").mkdir()
    (plain / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    copied = {p.relative_to(plain): p.read_bytes() for p in plain.rglob("*") if p.is_file()}
    for name in LEFT_OUT:
        (plain / name).parent.mkdir(exist_ok=True, parents=True)
        (plain / name).write_text("the base's weights")
    base, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(p for p in plain.rglob("*") if p.is_file()):
        blob = blobs / str(number)
        blob.write_bytes(file.read_bytes())
        blob.chmod(0o444)
        link = base / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    content = {blob: blob.read_bytes() for blob in blobs.iterdir()}
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    merged = esft.merge(base, tmp_path / "a", tmp_path / "merged")
    assert {blob: blob.read_bytes() for blob in blobs.iterdir()} == content
    found = {p.relative_to(merged): p.read_bytes() for p in merged.rglob("*") if p.is_file()}
    assert not any(p.is_symlink() for p in merged.rglob("*"))
    assert all(p.stat().st_mode & stat.S_IWUSR for p in merged.rglob("*"))  # though the cache's are read-only
    assert found.keys() == copied.keys() | {Path("esft_manifest.json")}
    assert {p.name for p in copied if copied[p] != found[p]} == {"model.safetensors"}


def test_values_that_the_bases_dtype_cannot_hold_are_refused(tmp_path):
    base = save_tiny(tmp_path / "base", dtype=torch.float16)
    model = esft.swap(load_model(str(base), "float32"), ExpertSelection({1: [3]}))
    weights = moe_layers(model)[0].experts.trained_down_proj
    for value, held in ((1e6, False), (-1e6, False), (65504.0, True)):
        with torch.no_grad():
            weights[0, 0, 0] = value
        esft.save_adapter(model, tmp_path / "a", overwrite=True)
        if held:
            esft.merge(base, tmp_path / "a", tmp_path / "merged")
            tensor = load_file(tmp_path / "merged" / "model.safetensors")[
                "model.layers.1.mlp.experts.3.down_proj.weight"
            ]
            assert tensor[0, 0] == value
            shutil.rmtree(tmp_path / "merged")
        else:
            with pytest.raises(InputError, match=r"experts\.3\.down_proj\.weight has values beyond torch\.float16"):
                esft.merge(base, tmp_path / "a", tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_adapter_that_holds_what_is_no_number_is_neither_merged_nor_loaded(tmp_path, value: float):
    base = save_tiny(tmp_path / "base")
    model = esft.swap(load_model(str(base)), ExpertSelection({1: [3]}))
    with torch.no_grad():
        moe_layers(model)[0].experts.trained_down_proj[0, 0, 0] = value
    esft.save_adapter(model, tmp_path / "a")
    with pytest.raises(InputError, match=r"experts\.3\.down_proj\.weight holds values that are infinite"):
        esft.merge(base, tmp_path / "a", tmp_path / "merged")
    stock = load_model(str(base))
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    with pytest.raises(InputError, match=r"experts\.3\.down_proj\.weight holds values that are infinite"):
        esft.load_adapter(stock, tmp_path / "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_adapters_values_take_the_bases_dtype(tmp_path, dtype: torch.dtype):
    base = save_tiny(tmp_path / "base", dtype=dtype)
    esft.save_adapter(tune(base, ExpertSelection({1: [3]}), "float32"), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()  # the base need not be the one that it was trained from
    with pytest.warns(UserWarning, match="does not say which base it is of") as warned:
        merged = esft.merge(str(base), str(tmp_path / "a"), str(tmp_path / "merged"))
    assert warned[0].filename == __file__
    assert merged == tmp_path / "merged"
    assert json.loads((merged / "esft_manifest.json").read_text()).keys() == {"files"}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    tuned = load_file(tmp_path / "a" / "adapter.safetensors")
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}
    for name, tensor in after.items():
        expected = tuned[name].to(dtype) if name in tuned else before[name]
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected)


@pytest.mark.filterwarnings("error:.*changes nothing")
def test_an_adapter_changes_something_as_soon_as_one_tensor_is_another(tmp_path):
    base = save_tiny(tmp_path / "base")
    for changed in ("gate_up", "down"):
        model = esft.swap(load_model(str(base)), ExpertSelection({1: [3]}))
        with torch.no_grad():
            getattr(moe_layers(model)[0].experts, f"trained_{changed}_proj").mul_(2)
        esft.merge(base, esft.save_adapter(model, tmp_path / f"a {changed}"), tmp_path / f"with {changed}")
    unchanged = esft.save_adapter(esft.swap(load_model(str(base)), ExpertSelection({1: [3]})), tmp_path / "a")
    with pytest.raises(UserWarning, match="changes nothing"):
        esft.merge(base, unchanged, tmp_path / "with nothing")


@pytest.mark.parametrize("experts", [[0], [3], [7, 0]])
def test_in_a_base_that_stacks_its_experts_only_the_slices_change(tmp_path, experts: list[int]):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base, save_original_format=False)
    tuned = tune(base, ExpertSelection({1: experts}))
    esft.save_adapter(tuned, tmp_path / "a")
    esft.merge(base, tmp_path / "a", tmp_path / "merged")
    expected = esft.unswap(tuned).state_dict()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    for name, tensor in after.items():
        assert torch.equal(tensor, expected[name])
        changed = [
            i for i, (new, old) in enumerate(zip(tensor, before[name], strict=True)) if not torch.equal(new, old)
        ]
        assert changed == (sorted(experts) if "layers.1.mlp.experts." in name else [])


def test_the_manifest_of_the_adapter_stays_with_the_result(tmp_path):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    merged = esft.merge(base, tmp_path / "a", tmp_path / "merged")
    manifest = json.loads((merged / "esft_manifest.json").read_text())
    files = manifest.pop("files")
    assert files == sorted(path.name for path in merged.iterdir())
    assert manifest == json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["base_digest"] == Checkpoint.open(base).digest()


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"  # 20 times 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), rf"^\S*/base: holds no tensor {GATE}, which the adapter changes"),
        (
            lambda t: t.update({GATE: t[GATE].T.contiguous()}),
            rf"/base/model\.safetensors: tensor {GATE} has shape \(32, 20\), which is not the model's",
        ),
        (
            lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}),
            rf"/base/model\.safetensors: tensor {GATE} is F8_E4M3; only F64, F32, F16, BF16 can be merged into",
        ),
        (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), rf"tensor {GATE} is I8; only"),
    ],
    ids=["missing", "transposed", "8 bits", "whole numbers"],
)
@pytest.mark.filterwarnings("ignore:.*does not say which base")
def test_a_tensor_of_the_base_that_the_adapters_cannot_replace_is_named(tmp_path, change, message: str):
    base = save_tiny(tmp_path / "base")
    esft.save_adapter(tune(base, ExpertSelection({1: [3]})), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    rewrite(base, change)
    with pytest.raises(InputError, match=message):
        esft.merge(base, tmp_path / "a", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_tensor_without_elements_stays_as_it_is():
    module = importlib.import_module("esft.adapters.merge")
    patch = module._Patch("f", "n", TensorInfo("F32", (0, 4), 8, 8), 8, 8, (0, 4), [])
    assert patch.content(b"", None) == b""


def test_a_base_without_its_head_is_merged_into_as_it_is(tmp_path):
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "base")
    tuned = tune(tmp_path / "base", ExpertSelection({1: [0]}))
    esft.save_adapter(tuned, tmp_path / "adapter")
    esft.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == names and "embed_tokens.weight" in names
    merged, stock = load_model(str(tmp_path / "out")), esft.unswap(tuned)
    assert torch.equal(merged(**token_batch()).logits, stock(**token_batch()).logits)
