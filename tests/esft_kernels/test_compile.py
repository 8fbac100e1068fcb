"""The kernels through the real compiler; the interpreter of the other tests hides what lowering breaks."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")
from tools.compile_kernels import Row, main


def test_small_model_compiles_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.compile_kernels", "--targets=sm_90", "--models=small", "--dtypes=bf16"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    *table, summary = result.stdout.strip().splitlines()
    assert summary.endswith("kernels compiled for sm_90: 0 problems")
    for kernel in ("grouped_gemm", "grouped_wgrad", "swiglu", "swiglu_backward", "combine"):
        assert any(line.split()[0] == kernel for line in table)
    assert any("HGMMA" in line for line in table if line.startswith("grouped_wgrad"))


@pytest.mark.parametrize("arg", ["--targets=sm_91", "--models=gpt", "--dtypes=fp64"])
def test_unknown_names_are_refused(arg, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit, match="2"):
        main([arg])
    assert arg.split("=")[1] in capsys.readouterr().err.splitlines()[-1]


def test_the_interpreter_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err.splitlines()[-1]


def test_what_counts_as_a_problem():
    good = Row("grouped_gemm", "sm_90", "bf16", "128x128x64 w8 s3", 200, 0, 98_304, "4 HGMMA")
    assert not good.problems()
    assert not replace(good, dtype="fp32", matrix="").problems()
    for bad in (replace(good, spills=8), replace(good, shared=300_000), replace(good, matrix="")):
        assert len(bad.problems()) == 1
