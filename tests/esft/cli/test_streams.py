"""Standard streams that are closed, full or given up: a right status, no traceback, and a line where there is room."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import esft
from esft.runs.run_folder import RunFolder
from tests.esft.models import save_tiny
from tests.esft.processes import started, status
from tests.esft.small_runs import settings

COMMANDS = [
    "--help",
    "train --help-config",
    "report run",
    "data d.jsonl --model base",
    "chat --model base --max-new-tokens 1",
]
FULL = "esft: standard output: No space left on device\n"
MISSING = "esft: nowhere: not a run folder (no metrics.jsonl)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "base")
    (folder / "d.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    run = RunFolder(folder / "run")
    run.begin(settings(), {"model": "m", "data": "d", "digests": {"model": "1", "data": "2"}}, None)
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5, "lr": 0.1, "tokens_per_second": 3.0}\n')
    return folder


def done(place: Path, command: str, redirected: str) -> tuple[int, str]:
    """Exit status of a command by a shell, and what it says on standard error; what it reads is one line."""
    ended = status(started(command.split(), place, redirected, "hi\n"))
    return ended, (place / "stderr").read_text()


# From this tree, with a standard output that is kept until it is full or the command ends.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
ENVIRONMENT["PYTHONPATH"] = str(Path(esft.__file__).parents[1])


@pytest.mark.parametrize("redirected", ["<&- >&- 2>&-", "<&- >/dev/full", ">&- 2>/dev/full"])
@pytest.mark.parametrize("command", ["train --help-config", "select --scores nowhere --out o"])
def test_a_real_shell_and_a_new_process_make_no_other_status(place, command: str, redirected: str):
    shell = ["sh", "-c", f'exec "$0" -m esft {command} {redirected}', sys.executable]
    ended = subprocess.run(shell, cwd=place, env=ENVIRONMENT, text=True, capture_output=True, timeout=120)
    assert (ended.returncode, ended.stderr) == done(place, command, redirected)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_is_full_is_told_in_one_line(place, command: str):
    ended, said = done(place, command, ">/dev/full")
    assert ended == 2 and said.endswith(FULL) and "Traceback" not in said


@pytest.mark.parametrize("command", ["report run", "chat --model base --max-new-tokens 1"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_stream_that_is_closed_is_one_that_goes_nowhere(place, command: str, closed: str):
    ended, said = done(place, command, closed)
    said = "".join(line for line in said.splitlines(keepends=True) if line.startswith("esft"))
    assert ended == 0 and said in (
        "",
        "esft: the answer is cut at 1 tokens (--max-new-tokens, or the model's positions)\n",
    )


@pytest.mark.parametrize(
    ("redirected", "said"), [("2>&-", ""), ("2>/dev/full", ""), (">&-", MISSING), ("<&-", MISSING)]
)
def test_an_error_that_cannot_be_told_is_a_status(place, redirected: str, said: str):
    assert done(place, "report nowhere", redirected) == (2, said)
    assert done(place, "no-stage", redirected)[0] == 2


@pytest.mark.parametrize("command", ["--help", "report run"])
def test_who_reads_no_more_ends_the_command(place, command: str):
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as gone:
        ended = subprocess.run(
            [sys.executable, "-m", "esft", *command.split()],
            cwd=place,
            env=ENVIRONMENT,
            stdout=gone,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    assert (ended.returncode, ended.stderr) == (141, b"")
