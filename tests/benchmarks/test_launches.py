import pytest
import torch

pytest.importorskip("triton")
from benchmarks import launches
from benchmarks.launches import count, counting
from benchmarks.shapes import SHAPES
from esft_kernels.triton_ops.combine import combine

UP_TO = {"forward": 12, "backward": 14}


@pytest.mark.parametrize("name", ["tiny", "deepseek-v2-lite", "qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_a_layer_launches_few_kernels_and_waits_for_none(name: str, arch: str):
    found = count(SHAPES[name], arch=arch)
    assert all(len(found[part]) <= most for part, most in UP_TO.items()), found
    assert found["forward"] == [
        "count_kernel",
        "place_kernel",
        "up_gemm_kernel",
        "grouped_gemm_kernel",
        "combine_kernel",
    ]


def test_every_launch_of_a_plain_layer_is_a_kernel_of_ours():
    found = count(SHAPES["deepseek-v2-lite"])
    assert found["backward"] == [
        "grad_gemm_kernel", "combine_sums_kernel", "grouped_wgrad_kernel", "grouped_wgrad_kernel",
        "grouped_gemm_kernel", "combine_kernel",
    ]  # fmt: skip


def test_biases_take_three_launches_more():
    assert len(count(SHAPES["gpt-oss-20b"])["backward"]) == 9


@pytest.mark.parametrize(("tokens", "launches"), [(1, (7, 8)), (256, (23, 24))])  # decoded in loads; first, in parts
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_quantized_pools_wait_for_nothing_either(format: str, tokens: int, launches: tuple[int, int]):
    found = count(SHAPES["deepseek-v2-lite"], tokens=tokens, format=format)
    assert (len(found["forward"]), len(found["backward"])) == launches, found


def test_operators_that_launch_are_counted_and_views_are_not():
    x, row = torch.empty(4, 3, 8, device="meta"), torch.empty(4, 3, dtype=torch.int64, device="meta")
    with counting() as found:
        (x.mT[1:].unsqueeze(0) + 1).sum()
        combine(x, row, row[0])
    assert found == ["aten::add.Tensor", "aten::sum", "combine_kernel"]


@pytest.mark.parametrize(
    "wait", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.nonzero, torch.Tensor.cpu, bool, int], ids=str
)
def test_what_waits_for_the_device_is_an_error(wait):
    with counting(), pytest.raises(RuntimeError, match="(?i)meta (tensor|function)"):  # there is no value to wait for
        wait(torch.empty(1, dtype=torch.int64, device="meta"))


def test_rows_say_how_many_there_are():
    forward, backward = launches.rows(SHAPES["tiny"], 64)
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    assert forward["launches"] == len(forward["of"].split(", ")) == 5
