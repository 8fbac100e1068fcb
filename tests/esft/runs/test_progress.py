import pytest

from esft.runs.progress import Bar


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_counts_the_steps_that_are_done_and_tells_the_loss(capsys, shown: bool):
    with Bar("esft", 4, 2, shown) as bar:
        bar.step(1.5)
        bar.step(1.25)
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")[1:]
    assert bool(lines) == shown
    if shown:
        assert "2/4" in lines[0] and "4/4" in lines[-1] and "loss=1.250" in lines[-1]
