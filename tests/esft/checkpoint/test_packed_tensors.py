import re

import pytest
import torch
from transformers import AutoConfig

import esft
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model
from esft.checkpoint.packed_tensors import PackedTensor, packed_format
from esft.checkpoint.source import check_dtypes, weight_files
from esft_kernels.formats.resolve import resolve_format
from tests.esft.checkpoint.files import rewrite, rewrite_json
from tests.esft.checkpoint.packed import fp8_checkpoint, mxfp4_checkpoint

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def config(said: dict | None):
    return AutoConfig.for_model("deepseek_v2", **({} if said is None else {"quantization_config": said}))


def test_the_format_is_what_the_configuration_names():
    assert packed_format(config(None), "c") is None
    assert packed_format(config(FP8), "c") == "fp8"
    assert packed_format(config({"quant_method": "mxfp4"}), "c") == "mxfp4"


def test_the_format_may_be_named_in_the_text_models_part_and_by_an_object():
    outer, inner = config(None), config({"quant_method": "mxfp4"})
    outer.get_text_config = lambda **_: inner
    assert packed_format(outer, "c") == "mxfp4"
    inner.quantization_config = type("Said", (), {"to_dict": lambda self: FP8})()
    assert packed_format(outer, "c") == "fp8"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq"}, r"^c: weights quantized by 'gptq' are not supported; fp8 and mxfp4 are$"),
        ({"quant_method": 3}, r"^c: weights quantized by 3 are not supported"),
        ({"quant_method": ["fp8"]}, r"^c: weights quantized by \['fp8'\] are not supported"),
        ({"bits": 4}, r"^c: weights quantized by None are not supported"),
        (FP8 | {"weight_block_size": [1, 32]}, r"^c: fp8 with weight_block_size \[1, 32\] is not supported"),
    ],
)
def test_other_quantizations_are_refused(said: dict, message: str):
    with pytest.raises(esft.InputError, match=message):
        packed_format(config(said), "c")


def matrix() -> PackedTensor:
    return PackedTensor("fp8", tuple(p.contiguous() for p in resolve_format("fp8").encode(torch.randn(200, 130))))


def stack() -> PackedTensor:
    return PackedTensor("mxfp4", resolve_format("mxfp4").quantize(torch.randn(3, 10, 64)))


def test_a_matrix_in_fp8_is_code_times_scale():
    packed = matrix()
    codes, scales = packed.parts
    wanted = codes.float() * scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
    assert packed.shape == (200, 130) and packed.matrices() == [packed.parts]
    assert torch.equal(packed.read(), wanted) and packed.read().dtype == torch.float32
    assert torch.equal(torch.cat(list(packed.pieces())), wanted.reshape(-1))
    packed.check("w")


def test_a_stack_in_mxfp4_is_of_matrices_that_the_model_has_the_other_way_round():
    packed = stack()
    kind = resolve_format("mxfp4")
    wanted = [kind.decode(parts, 10, 64, torch.empty(640)).mT for parts in packed.matrices()]
    assert packed.shape == (3, 64, 10) and len(packed.matrices()) == 3
    assert torch.equal(packed.read(), torch.stack(wanted))
    assert all(torch.equal(packed.read(index), wanted[index]) for index in range(3))
    assert torch.equal(torch.cat(list(packed.pieces())), packed.read().reshape(-1))
    packed.check("w")


@pytest.mark.parametrize("make", [matrix, stack])
def test_parts_that_do_not_fit_or_hold_no_numbers_are_named(make):
    packed = make()
    codes, scales = packed.parts
    with pytest.raises(esft.InputError, match=r"^w scale"):
        PackedTensor(packed.format, (codes, scales[:, :-1].contiguous())).check("w")
    scales.view(-1)[-1] = 255 if packed.format == "mxfp4" else float("inf")
    with pytest.raises(esft.InputError, match=rf"^w: a scale of {packed.format} is not finite$"):
        packed.check("w")


FP8_NAME, FP4_NAME = "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("make", "gone", "said"),
    [
        (fp8_checkpoint, f"{FP8_NAME}_scale_inv", f"tensor {FP8_NAME} has codes of fp8 and no scales"),
        (fp8_checkpoint, FP8_NAME, f"tensor {FP8_NAME} has scales of fp8 and no codes in F8_E4M3"),
        (mxfp4_checkpoint, f"{FP4_NAME}_scales", f"tensor {FP4_NAME} has codes of mxfp4 and no scales"),
        (mxfp4_checkpoint, f"{FP4_NAME}_blocks", f"tensor {FP4_NAME} has scales of mxfp4 and no codes in U8"),
    ],
)
def test_codes_without_scales_are_no_weights_and_scales_without_codes_neither(tmp_path, make, gone: str, said: str):
    rewrite(make(tmp_path / "base"), lambda tensors: tensors.pop(gone))
    with pytest.raises(esft.InputError, match=f"/base: {said}$"):
        Checkpoint.open(tmp_path / "base")


@pytest.mark.parametrize("make", [fp8_checkpoint, mxfp4_checkpoint])
@pytest.mark.parametrize("said", [None, {"quant_method": "gptq"}])
def test_weights_in_few_bits_that_the_configuration_does_not_tell_of_are_refused(tmp_path, make, said):
    base = make(tmp_path / "base")
    rewrite_json(base / "config.json", lambda config: config.update(quantization_config=said))
    with pytest.raises(esft.InputError, match=r"/base: tensor \S+ is in (fp8|mxfp4), and config.json has no quant"):
        check_dtypes(base, weight_files(base), AutoConfig.from_pretrained(base))


@pytest.mark.parametrize("make", [matrix, stack])
def test_codes_that_are_no_matrices_are_named(make):
    codes, scales = make().parts
    for wrong in (codes.reshape(-1), codes[None], codes[:0]):
        message = rf"^w: codes of shape {re.escape(str(tuple(wrong.shape)))} are no weight in {make().format}$"
        with pytest.raises(esft.InputError, match=message):
            PackedTensor(make().format, (wrong, scales)).check("w")


@pytest.mark.parametrize("make", [fp8_checkpoint, mxfp4_checkpoint])
def test_a_checkpoints_weights_are_those_that_transformers_reads(make, tmp_path):
    folder = make(tmp_path / "base")
    checkpoint, state = Checkpoint.open(folder), load_model(str(folder)).state_dict()
    found = dict(checkpoint.tensors())
    assert found.keys() == checkpoint.names() and any(isinstance(t, PackedTensor) for t in found.values())
    for name, tensor in found.items():
        value = tensor.read() if isinstance(tensor, PackedTensor) else tensor
        if name in state:
            assert torch.equal(value.bfloat16(), state[name]), name
    last = found["model.layers.1.mlp.experts.7.up_proj.weight"] if make is fp8_checkpoint else None
    if last is not None:
        assert torch.equal(last.read().bfloat16(), state["model.layers.1.mlp.experts.gate_up_proj"][7, 128:])
