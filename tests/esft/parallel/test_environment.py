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


@pytest.mark.parametrize("text", ["two", "-1", "1.5", "٣", "9" * 10])
def test_what_is_no_number_is_refused_by_its_name(monkeypatch, text: str):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(InputError, match=f"environment variable WORLD_SIZE must be a whole number, got '{text}'"):
        environment.size_of_job()
