"""The package's public names, which are imported when they are used."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import esft

STUB = Path(esft.__file__).with_suffix(".pyi")


def test_every_public_name_is_what_the_stub_says():
    named = {
        alias.name: f"esft.{node.module}"
        for node in ast.parse(STUB.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(esft.__all__) == set(dir(esft)) == named.keys()
    for name, module in named.items():
        assert getattr(esft, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = esft.no_such_name


def ran(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(STUB.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    assert ran("import esft, sys; print({'torch', 'transformers', 'triton'} & sys.modules.keys())") == "set()"


@pytest.mark.parametrize("imports", ["import esft, transformers", "import transformers.modeling_utils, esft"])
def test_esft_is_an_experts_backend_of_transformers_whichever_is_imported_first(imports: str):
    model = "transformers.OlmoeConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=9)"
    code = f"{imports}\nm = transformers.OlmoeForCausalLM({model})\nm.set_experts_implementation('esft')\nprint('set')"
    assert ran(code) == "set"


@pytest.mark.parametrize("first", ["esft.experts.moe_layers", "esft.transformers_internals"])
def test_whatever_module_comes_first_is_whole_and_the_backend_is_there(first: str):
    code = f"import {first}; from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as A; print('esft' in A)"
    assert ran(code) == "True"
