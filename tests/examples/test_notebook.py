"""The notebook, start to end with few records and steps."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

import esft

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "esft_in_five_minutes.ipynb"


def notebook(**parameters: object):
    """The notebook with other values in its first cell of code, each of which has to be there."""
    read = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in read.cells if "parameters" in cell.metadata.get("tags", ()))
    names = set(re.findall(r"\b[A-Z_]+\b(?=.*=)", cell.source))
    assert names == parameters.keys()
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    return read


@pytest.mark.slow
def test_the_notebook_runs_and_ends_with_a_checkpoint_that_stock_transformers_loads(tmp_path):
    out = tmp_path / "out"
    read = notebook(STEPS=3, TRAIN_RECORDS=60, TEST_RECORDS=4, OUT=str(out))
    NotebookClient(read, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = [output for cell in read.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in shown if output.get("name") == "stdout")
    assert re.search(r"^\d+% -> \d+%$", text, re.MULTILINE) and "adapter " in text
    assert sum("image/png" in output.get("data", ()) for output in shown) == 1
    adapter = esft.ExpertSelection.load(out / "run" / "adapter" / "expert_cfg.json")
    assert len(adapter.experts) == 7 and adapter.shared_experts
    merged, base = (AutoModelForCausalLM.from_pretrained(f) for f in (out / "merged", NOTEBOOK.parent / "tiny-moe"))
    changed = [name for name, value in merged.state_dict().items() if not value.equal(base.state_dict()[name])]
    assert changed and all("experts" in name for name in changed)
