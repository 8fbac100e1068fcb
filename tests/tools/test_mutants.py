"""Mutation testing itself: what the small wrong changes are, and that tests which notice them are told from others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools.mutants.__main__ import EQUIVALENT, ROOT, mirror, modules, sample
from tools.mutants.operators import mutants

SCRIPT = """
import sys
from pathlib import Path
from tools.mutants import runner
from tools.mutants.operators import mutants
runner._import_what_is_large = lambda: None
root = Path(sys.argv[1])
found = mutants("pack/sign.py", (root / "pack/sign.py").read_text())
with runner.Runner(root, 1, 100, whole=True) as run:
    for outcome in run.run([(mutant, "tests/pack/test_sign.py") for mutant in found]):
        print(outcome.killed_by, "hung |" if outcome.hung else "|", outcome.mutant.after)
runner._tree = root
print(runner._tests_fail(["tests/waits.py"], 2), runner._tests_fail(["tests/fails.py"], 60))
"""


def after(source: str) -> set[str]:
    return {mutant.after for mutant in mutants("m.py", source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = b < c\n", {"a = b <= c"}),
        ("a = b + c\n", {"a = b - c"}),
        ("a = 'text ' + c\n", set()),
        ("a = b and not c\n", {"a = ((b) or (not c))", "a = ((b))", "a = ((not c))", "a = b and (c)"}),
        ("a = 1\n", {"a = 2"}),
        ("a = True\n", {"a = False"}),
        ("a = b[-1]\n", {"a = b[(1)]", "a = b[-2]"}),
        ("a = b if c else d\n", {"a = (b)", "a = (d)"}),
        ("if a:\n    b(c, d)\n", {"if False:", "if not (a):", "pass"}),
        ("a.b = c\n", {"pass"}),
        ("a += b\n", {"pass"}),
        ("a = sorted(b)\n", {"a = (b)"}),
        ("a = b.contiguous()\n", {"a = (b)"}),
        ("a = f(b, c=d)\n", {"a = f(b, )"}),
        ("a = max(b, c)\n", {"a = min(b, c)"}),
        ("a = [b for b in c if b.d]\n", {"a = [b for b in c if True]"}),
        ('"""Text."""\n', set()),
        ("def f(a: int | None) -> 'b | c':\n    raise ValueError(f'{a + 1}')\n", set()),
    ],
)
def test_the_changes_of_a_line(source, expected):
    assert after(source) == expected


def test_a_change_stands_where_its_place_says_also_behind_letters_of_two_bytes():
    source = "# é\nx = 'é', 1\ny = 2\n"
    (first, second) = mutants("m.py", source)
    assert (first.line, first.apply(source)) == (2, "# é\nx = 'é', 2\ny = 2\n")
    assert (second.line, second.apply(source)) == (3, "# é\nx = 'é', 1\ny = 3\n")


def test_a_sample_is_the_same_every_time_and_another_seed_gives_another():
    module = "esft_kernels/routing.py"
    assert sample(module, 20, seed=0) == sample(module, 20, seed=0) != sample(module, 20, seed=1)
    assert len(sample(module, 20, seed=0)) == 20


def test_a_sample_has_no_mutant_that_is_listed_as_equivalent():
    entries = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8"))
    module = entries[0]["module"]
    listed = {(entry["line"], entry["becomes"]) for entry in entries if entry["module"] == module}
    found = {(mutant.before, mutant.after) for mutant in sample(module, 1 << 20, seed=0)}
    assert found and not found & listed


def test_every_module_has_a_mirror():
    for module in modules():
        if not (ROOT / mirror(module)).is_file():  # which only names and texts may do without
            assert not mutants(module, (ROOT / module).read_text(encoding="utf-8")), f"no {mirror(module)}"


def test_every_mutant_listed_as_equivalent_is_one_of_todays_and_has_a_reason():
    entries = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8"))
    listed = {(entry["module"], entry["line"], entry["becomes"]) for entry in entries if entry["reason"]}
    assert len(listed) == len(entries)
    found = set()
    for module in {entry["module"] for entry in entries}:
        every = mutants(module, (ROOT / module).read_text("utf-8"), lambda *lines, of=module: (of, *lines) in listed)
        found |= {(module, mutant.before, mutant.after) for mutant in every}
    assert listed == found


@pytest.mark.slow
def test_mutants_are_killed_by_the_mirror_or_by_the_rest_or_survive(tmp_path: Path):
    files = {
        "pack/__init__.py": "",
        "pack/sign.py": "def sign(x):\n    return -1 if x < 0 else 1\n",
        "tests/pack/test_sign.py": "from multiprocessing import get_context\nfrom pack.sign import sign\n\n"
        "def test_one():\n    process = get_context('fork').Process(target=int)\n    process.start()\n"
        "    process.join()\n    assert process.exitcode == 0 and sign(5) == 1\n",
        "tests/waits.py": "import time\n\ndef test_three():\n    time.sleep(60)\n",
        "tests/fails.py": "def test_four():\n    assert False\n",
        "tests/test_other.py": "from pack.sign import sign\n\ndef test_two():\n    assert sign(-5) == -1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # none is needed
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.splitlines()) == {
        "mirror | return (-1)",
        "rest | return (1)",
        "rest | return (1) if x < 0 else 1",
        "rest | return -2 if x < 0 else 1",
        "None | return -1 if x <= 0 else 1",
        "None | return -1 if x < 1 else 1",
        "mirror | return -1 if x < 0 else 2",
        "hung failed",
    }
    assert (tmp_path / "pack/sign.py").read_text() == files["pack/sign.py"]
