import io
import logging
import sys
import warnings

import pytest

import esft
from esft.cli.output import complain, explain, hush_libraries, listen, open_streams, say, say_marked, say_part
from esft.errors import reading


def test_lines_of_ours_stay_lines(capsys):
    say("a\x07", "b\nc")
    complain("a\nb", by="tool")
    printed = capsys.readouterr()
    assert printed.out == "a\\x07\nb\\nc\n" and printed.err == "tool: a\\nb\n"


def test_a_part_of_a_text_has_lines_and_tabs_and_no_end(capsys):
    say_part("a\n\tb\x1b[1m\n")
    say_part("\u202ec\r")
    assert capsys.readouterr().out == "a\n\tb\\x1b[1m\n\\u202ec\\r"


def test_an_argument_from_python_is_an_option_on_the_command_line(capsys):
    text = "a: exists already (`overwrite=True` replaces it, `resume=True` goes on), `max_length=257` is beyond"
    explain(failed(esft.InputError(f"{text}; `trust_remote_code=True`, `overwrite`, `max_length=x`, `steps=3`")))
    assert capsys.readouterr().err == (
        "esft: a: exists already (--overwrite replaces it, --resume goes on), --max-length 257 is beyond; "
        "--trust-remote-code, `overwrite`, `max_length=x`, `steps=3`\n"
    )


def failed(error: Exception, what: str | None = None) -> Exception:
    with pytest.raises(type(error)) as raised:
        if what is None:
            raise error
        with reading(what):
            raise error
    return raised.value


@pytest.mark.parametrize(
    ("error", "what", "line"),
    [
        (esft.InputError("a: no"), "b", "a: no"),
        (RuntimeError("x\ny"), "b", "b: cannot be used (RuntimeError: x)"),
        (KeyError("k"), None, "KeyError 'k' (ESFT_DEBUG=1 shows where)"),
        (PermissionError(13, "Permission denied", "f"), "b", "f: Permission denied"),
        (OSError(28, "No space left on device", "f"), "b", "b: cannot be used (f: No space left on device)"),
        (MemoryError(), None, "MemoryError (ESFT_DEBUG=1 shows where)"),
    ],
)
def test_an_error_is_one_line_and_its_traceback_is_there_for_who_asks(capsys, monkeypatch, error, what, line):
    monkeypatch.delenv("ESFT_DEBUG", raising=False)
    explain(failed(error, what))
    assert capsys.readouterr().err == f"esft: {line}\n"
    monkeypatch.setenv("ESFT_DEBUG", "1")
    explain(failed(error, what))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == f"esft: {line}"


def test_warnings_of_ours_are_lines_and_those_of_others_are_left(capsys, monkeypatch):
    theirs = []
    monkeypatch.setattr(warnings, "showwarning", lambda *values: theirs.append(values[0]))
    logger = logging.getLogger("esft")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    listen()
    logger.warning("%s: cut", "a\x1b")
    warnings.showwarning(UserWarning("slow\x1b"), UserWarning, "/x/esft/swapping/swap.py", 3)
    warnings.showwarning(UserWarning("of others"), UserWarning, "/x/torch/nn.py", 3)
    assert capsys.readouterr().err == "esft: warning: a\\x1b: cut\nesft: warning: slow\\x1b\n"
    assert [str(warning) for warning in theirs] == ["of others"]


def test_a_stream_that_somebody_else_put_in_place_of_the_standard_one_stays(monkeypatch):
    theirs = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stderr", theirs)
    open_streams()
    assert sys.stderr is theirs and theirs.errors == "backslashreplace"


def test_libraries_are_hushed_and_our_own_warnings_are_not(monkeypatch):
    from transformers.utils import logging as theirs

    before, level = theirs.get_verbosity(), logging.getLogger().level
    try:
        with warnings.catch_warnings(record=True) as heard:
            hush_libraries()
            assert theirs.get_verbosity() == logging.ERROR and not theirs.is_progress_bar_enabled()
            assert not logging.getLogger("some.library").isEnabledFor(logging.WARNING)
            assert logging.getLogger("esft").isEnabledFor(logging.WARNING)
            warnings.warn_explicit("of others", UserWarning, "x.py", 1, module="torch.nn")
            warnings.warn_explicit("ours", UserWarning, "y.py", 1, module="esft.cli.parser")
        assert [str(each.message) for each in heard] == ["ours"]
    finally:
        theirs.set_verbosity(before)
        logging.getLogger().setLevel(level)
        theirs.enable_progress_bar()


PARTS = [("ask\x1b[2J\n", False), ("yes\nno", True), ("", False)]


@pytest.mark.parametrize(
    ("terminal", "no_color", "shown"),
    [
        (True, "", "ask\\x1b[2J\n\x1b[32myes\x1b[0m\n\x1b[32mno\x1b[0m\n"),
        (True, "1", "ask\\x1b[2J\n[[yes]]\n[[no]]\n"),
        (False, "", "ask\\x1b[2J\n[[yes]]\n[[no]]\n"),
    ],
)
def test_marked_text_is_coloured_line_by_line_on_a_terminal_and_in_brackets_elsewhere(
    capsys, monkeypatch, terminal: bool, no_color: str, shown: str
):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    say_marked(PARTS)
    assert capsys.readouterr().out == shown


def test_what_is_told_of_the_data_is_a_line_unless_it_is_quiet(capsys, monkeypatch):
    logger = logging.getLogger("esft")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    try:
        listen()
        logger.info("d: 3 records")
        assert capsys.readouterr().err == "esft: info: d: 3 records\n"
        logger.setLevel(logging.WARNING)  # as hush_libraries does
        logger.info("d: 3 records")
        assert capsys.readouterr().err == ""
    finally:
        logger.setLevel(level)
