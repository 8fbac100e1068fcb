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


def test_what_torchrun_says_is_taken(monkeypatch):
    said = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RESTART_COUNT": 2}
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))
    assert (environment.size_of_job(), environment.own_rank(), environment.attempt()) == (8, 5, 2)
    assert (environment.local_size(), environment.local_rank(), environment.own_name()) == (4, 1, "rank 5: ")


def test_the_first_rank_of_a_job_of_one_that_was_never_begun_anew_is_a_process_of_its_own(monkeypatch):
    said = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0}
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))
    assert (environment.size_of_job(), environment.own_rank(), environment.attempt()) == (1, 0, 0)
    assert (environment.local_size(), environment.local_rank(), environment.own_name()) == (1, 0, "")


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
