"""What ``torchrun`` says in the environment of every process that it starts; a process of its own has none of it."""

from __future__ import annotations

import os

from esft.errors import InputError


def size_of_job() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1, least=1)


def own_rank() -> int:
    """Which of them this one is, from 0 on. Raises InputError for one that is not of the job."""
    rank, size = _number("RANK", 0), size_of_job()
    if rank >= size:
        raise InputError(f"environment variable RANK is {rank}, of a job of {size} (WORLD_SIZE): torchrun sets both")
    return rank


def local_size() -> int:
    """How many of them are on this machine."""
    return _number("LOCAL_WORLD_SIZE", size_of_job(), least=1)


def local_rank() -> int:
    """Which of these this one is."""
    return _number("LOCAL_RANK", own_rank())


def attempt() -> int:
    """How often the job was started again."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def hosts_store() -> bool:
    """Whether the job's key-value store is in this process; torchrun has it in its own."""
    return own_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def own_name() -> str:
    """Of this process, in front of what it says: only one of several needs any."""
    try:
        return f"rank {own_rank()}: " if size_of_job() > 1 else ""
    except InputError:  # which is what it is about to say
        return ""


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise InputError(f"environment variable {name} must be a whole number, {least} or more, got {text[:40]!r}")
    return int(text or default)
