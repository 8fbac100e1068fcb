"""What is read of the environment that torchrun makes."""

import pytest

from esft.errors import InputError
from esft.parallel import environment


def test_a_process_of_its_own_is_the_only_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (environment.size_of_job(), environment.own_rank(), environment.attempt()) == (1, 0, 0)
    assert (environment.local_size(), environment.local_rank(), environment.own_name()) == (1, 0, "")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert environment.hosts_store()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert not environment.hosts_store()


@pytest.mark.parametrize(("said", "name"), [((8, 5, 2, 4, 1), "rank 5: "), ((1, 0, 0, 1, 0), "")])  # the least, too
def test_what_torchrun_says_is_taken(monkeypatch, said: tuple[int, ...], name: str):
    variables = ("WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    for variable, value in zip(variables, said, strict=True):
        monkeypatch.setenv(variable, str(value))
    assert (environment.size_of_job(), environment.own_rank(), environment.attempt()) == said[:3]
    assert (environment.local_size(), environment.local_rank(), environment.own_name()) == (*said[3:], name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("WORLD_SIZE", text) for text in ("two", "-1", "1.5", "9" * 30, "0")] + [("LOCAL_WORLD_SIZE", "0"), ("RANK", "x")],
)
def test_what_is_no_number_is_refused_by_its_name(monkeypatch, name: str, text: str):
    monkeypatch.setenv(name, text)
    least = 0 if name == "RANK" else 1
    said = f"^environment variable {name} must be a whole number, {least} or more, got '{text}'$"
    read = {
        "WORLD_SIZE": environment.size_of_job,
        "LOCAL_WORLD_SIZE": environment.local_size,
        "RANK": environment.own_rank,
    }
    with pytest.raises(InputError, match=said):
        read[name]()
    assert environment.own_name() == ""  # in front of that


@pytest.mark.parametrize(("rank", "size"), [("1", ""), ("2", "2")])
def test_a_rank_beyond_its_job_is_refused(monkeypatch, rank: str, size: str):
    """What is left in a shell of a job that has ended: the command would wait for others, or leave the work to them."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(
        InputError, match=rf"^environment variable RANK is {rank}, of a job of {size or 1} \(WORLD_SIZE\)"
    ):
        environment.own_rank()
    assert environment.own_name() == ""
