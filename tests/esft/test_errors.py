import pytest

import esft
from esft.errors import Interrupted, check_is_error, first_line, reading, what_was_read


@pytest.mark.parametrize(
    ("kind", "standard"),
    [(esft.InputError, ValueError), (esft.DiskError, OSError), (esft.DivergenceError, ArithmeticError)],
)
def test_every_error_is_the_packages_and_a_standard_one_with_its_message(kind: type[Exception], standard):
    for base in (standard, esft.ESFTError):  # a caller who knows nothing of this package can catch it too
        with pytest.raises(base, match=r"^a\.json: line 3: no$"):
            raise kind("a.json: line 3: no")
    assert not issubclass(esft.InputError, OSError) and not issubclass(esft.DiskError, ValueError)


def test_an_interruption_says_its_message_and_knows_its_signal_and_whether_the_run_can_go_on():
    stopped = Interrupted("stopped after step 3", 15, resumable=True)
    assert (str(stopped), stopped.signal, stopped.resumable) == ("stopped after step 3", 15, True)
    assert not Interrupted("interrupted", 2).resumable and isinstance(stopped, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one"),
        (ValueError("of field 'a':\n   is wrong\nthird"), "of field 'a': is wrong"),
        (KeyError("a"), "KeyError 'a'"),
        (ValueError(" \n"), "ValueError"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_is_said_by_its_first_line_or_its_kind(error: Exception, line: str):
    assert first_line(error) == line


def test_an_error_of_another_library_says_what_was_being_read_the_innermost_first():
    with pytest.raises(ZeroDivisionError) as failed, reading("a model"), reading("its config"):
        raise ZeroDivisionError
    assert what_was_read(failed.value) == "its config"
    assert failed.value.__notes__ == ["while reading its config", "while reading a model"]
    assert what_was_read(ValueError()) is None


class PanicException(BaseException):
    """As compiled code of other libraries raises it."""


def test_a_panic_of_compiled_code_is_an_error_and_what_ends_the_process_is_none():
    with pytest.raises(PanicException) as failed, reading("a tokenizer"):
        raise PanicException
    assert what_was_read(failed.value) == "a tokenizer"
    check_is_error(failed.value)
    check_is_error(ValueError())
    for ends in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ends) as ended, reading("a tokenizer"):
            raise ends
        with pytest.raises(ends):
            check_is_error(ended.value)
        assert what_was_read(ended.value) is None


def test_an_error_of_ours_names_what_it_is_about_itself():
    with pytest.raises(esft.InputError) as failed, reading("a model"):
        raise esft.InputError("no")
    assert what_was_read(failed.value) is None
    with reading("nothing wrong"):
        pass


def test_long_words_of_another_library_are_cut():
    assert first_line(ValueError("x" * 400 + "\nmore")) == "x" * 400
    assert first_line(ValueError("x" * 5000)) == "x" * 400 + "..."
