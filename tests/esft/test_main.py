import subprocess
import sys


def test_the_package_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "esft", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: esft")
    done = subprocess.run(
        [sys.executable, "-m", "esft", "report", "no/run"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (2, "esft: no/run: not a run folder (no metrics.jsonl)\n")
