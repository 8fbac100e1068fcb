"""Models and data by their names on the hub, through the hub's own libraries."""

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.esft.hub import hub
from tests.esft.models import save_tiny, write_records

STAGES = """
data who/records@train --model who/model
score --model who/model --data who/records@train --out scores.json
select --scores scores.json --model who/model --out experts.json
plan --model who/model --experts experts.json
train --model who/model --data who/records@train --eval-data who/records@test --experts experts.json --out run --steps 2
train --model who/model --data who/records --experts experts.json --out stream --steps 2 --streaming
eval --model who/model --adapter run/adapter --data who/records@test
generate --model who/model --adapter run/adapter --prompt a --max-new-tokens 2
merge --model who/model --adapter run/adapter --out merged
"""
REFUSED = {
    "data who/nothing --model who/model": "who/nothing: no such file or folder, and no data set of the hub's",
    "data who/records@x --model who/model": 'Unknown split "x"',
    "data who/records --model who/nothing": "who/nothing: no such folder, and no model of that name can be had",
    "merge --model who/nothing --adapter run/adapter --out m": "who/nothing: cannot be had from the hub",
}
RUN = "import sys; from esft.cli.parser import main; print([main(s.split()) for s in sys.argv[1:]])"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "hub" / "models" / "who" / "model")
    (tmp_path / "hub" / "datasets" / "who" / "records").mkdir(parents=True)
    for split, count in (("train", 24), ("test", 4)):
        write_records(tmp_path / "hub" / "datasets" / "who" / "records" / f"{split}.jsonl", count)
    return tmp_path


def command(address: str, *stages: str) -> subprocess.CompletedProcess[str]:
    """Stages in one new process, which looks for the hub there: its libraries read that when they are imported."""
    env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": "home", "CUDA_VISIBLE_DEVICES": ""}
    env = {name: value for name, value in env.items() if name not in ("HF_ASSETS_CACHE", "HF_DATASETS_CACHE")}
    asked = [f"{stage} --quiet" if stage.split()[0] not in ("select", "plan", "merge") else stage for stage in stages]
    return subprocess.run([sys.executable, "-c", RUN, *asked], env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_stage_takes_a_model_and_data_by_their_names_on_the_hub(work):
    stages = STAGES.split("\n")[1:-1]
    with hub(work / "hub") as address:
        done = command(address, *stages, *REFUSED)
    said = done.stderr.splitlines()
    assert done.stdout.splitlines()[-1] == str([0] * len(stages) + [2] * len(REFUSED)), done.stderr
    assert len(said) == len(REFUSED) and all(map(operator.contains, said, REFUSED.values())), done.stderr
    assert "24 records" in done.stdout and json.loads((work / "run" / "summary.json").read_text())["steps"] == 2
    base = {file.name for file in (work / "hub" / "models" / "who" / "model").iterdir()}
    assert {file.name for file in (work / "merged").iterdir()} == base | {"esft_manifest.json"}
    assert not any(file.is_symlink() for file in (work / "merged").iterdir())
