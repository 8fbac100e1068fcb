"""The kernels through the real compiler; the interpreter of the other tests hides what lowering breaks."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")
from tools.compile_kernels import TARGETS, Row, main
from tools.sass import Loop, main_loop

KERNELS = ("up_gemm", "grouped_gemm", "grad_gemm", "grouped_wgrad", "combine", "adamw")
# A grad_gemm tile whose accumulator and H do not fit the registers of four warps.
SPILLING = """
import sys
from esft_kernels.triton_ops import tiles
from tools import compile_kernels
real = tiles.choose_tiles
def spilling(arch, dtype, op, rows, features):
    return tiles.Tiles(128, 256, 64, 4, 2) if op == "grad" else real(arch, dtype, op, rows, features)
tiles.choose_tiles = spilling
sys.exit(compile_kernels.main(["--targets=sm_90", "--models=tiny", "--dtypes=bf16", "--formats=plain", "--rows=64"]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "model", "dtypes", "formats", "variants", "rows"),
    [
        ("sm_80", "tiny", "bf16", "nf4", "chosen", "0.1,64"),
        ("sm_90", "deepseek-v2-lite", "bf16", "plain", "chosen", "1024,many"),
        ("sm_90", "deepseek-v2-lite", "bf16", "plain", "long turns", "1024"),
        ("sm_100", "tiny", "bf16", "int8", "chosen", "8,1024"),
        ("sm_120", "tiny", "bf16", "fp8", "persistent descriptors", "64"),
        # Its larger rows once broke a pass of AMD's compiler.
        ("gfx942", "qwen3-235b-a22b", "bf16", "plain", "chosen", "0.1,8,64,1024,many"),
        ("gfx942", "gpt-oss-20b", "bf16", "mxfp4", "chosen", "0.1,8,64,1024,many"),
        ("gfx942", "tiny", "bf16", "plain", "persistent", "0.1,8,64,1024,many"),
        ("sm_80", "tiny", "fp32,tf32", "plain", "chosen", "64"),
    ],
)
def test_compiles_without_spills_and_with_matrix_instructions(target, model, dtypes, formats, variants, rows):
    options = {
        "targets": target, "models": model, "dtypes": dtypes, "formats": formats, "variants": variants, "rows": rows,
    }  # fmt: skip
    result = run("-m", "tools.compile_kernels", *(f"--{name}={value}" for name, value in options.items()))
    assert result.returncode == 0, result.stdout + result.stderr
    *table, summary = result.stdout.strip().splitlines()
    assert summary.endswith(f"kernels compiled for {target}: 0 problems")
    for kernel in (*KERNELS, *["decode"] * (formats != "plain")):
        assert any(line.split()[0] == kernel for line in table)
    if variants == "long turns":
        loops = [line for line in table if line.split()[0] in KERNELS[:3]]
        slots = {
            kernel: [
                int(line.split()[-1].rstrip("%")) for line in loops if line.startswith(kernel) and "x256x128" in line
            ]
            for kernel in KERNELS[:3]
        }
        assert all(int(line.split()[-2]) > 0 for line in loops)  # UTMALDG in the main loop
        assert all(len(found) >= 2 and min(found) >= 85 for found in slots.values())
    elif target == "sm_90":  # issue slots left to the matrix instructions, of the tiles for many rows
        large = [line for line in table if line.split()[4].startswith("128x") and line.split()[0] in KERNELS]
        slots, wide = ([int(line.split()[-1].rstrip("%")) for line in large if (" wide " in line) == w] for w in (0, 1))
        assert len(slots) >= 4 and min(slots) >= 75 and sum(slots) / len(slots) >= 80
        assert wide and min(wide) >= 70


@pytest.mark.slow
def test_a_kernel_made_to_spill_fails():
    result = run("-c", SPILLING)
    assert result.returncode == 1, result.stdout + result.stderr
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert failed and all("grad_gemm 128x256x64 w4 s2: spills" in line for line in failed)


@pytest.mark.parametrize(
    "arg", ["--targets=sm_91", "--models=gpt", "--dtypes=fp64", "--formats=gptq", "--variants=slow", "--rows=65"]
)
def test_unknown_names_are_refused(arg, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match="2"):
        main([arg])
    assert arg.split("=")[1] in capsys.readouterr().err.splitlines()[-1]


def test_the_interpreter_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err.splitlines()[-1]


GOOD = Row(
    kernel="grouped_gemm", target="sm_90", dtype="bf16", format="plain", tile="128x128x64 w8 s3",
    registers=200, stack=0, spills=0, shared=98_304, programs=1, matrix="HGMMA", loop_matrix=4, loop_others=90,
    loop_tiles=1, described=True, slots="80%",
)  # fmt: skip


def test_what_counts_as_a_problem():
    assert not GOOD.problems()
    assert not replace(GOOD, dtype="fp32", matrix="", loop_matrix=0).problems()
    assert replace(GOOD, dtype="tf32", matrix="", loop_matrix=0).problems()
    assert not replace(GOOD, tile="16x128x64 w4 s3", matrix="HMMA").problems()
    bad = [{"spills": 8}, {"stack": 16}, {"shared": 300_000}, {"matrix": "", "loop_matrix": 0}, {"loop_matrix": 0}]
    assert not replace(GOOD, loop_tiles=0, described=False).problems()
    for change in (*bad, {"matrix": "HMMA"}, {"loop_tiles": 0}):  # Ampere's instruction on Hopper
        assert len(replace(GOOD, **change).problems()) == 1
    assert {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"} == set(TARGETS)


def test_the_main_loop_is_the_shortest_one_with_matrix_instructions():
    names = ["IADD", "LDG", "HMMA.1", "BRA", "IADD", "NOP", "HMMA.1", "HMMA.1", "LDS", "BRA", "LDS", "BRA", "BRA"]
    assert main_loop(names, [(1, 3), (4, 9), (10, 11), (0, 12)]) == Loop(matrix=1, others=2)
    assert main_loop(names, [(4, 9), (10, 11), (0, 12)]) == Loop(matrix=2, others=4)
    assert main_loop(names, [(10, 11)]) == Loop(0, 0)
    assert main_loop(["HGMMA", "UTMALDG.2D", "UTMALDG.3D", "BRA"], [(0, 3)]) == Loop(matrix=1, others=3, tiles=2)
