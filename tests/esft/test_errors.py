import pytest

import esft
from esft.errors import first_line


@pytest.mark.parametrize(
    ("kind", "standard"),
    [(esft.InputError, ValueError), (esft.DiskError, OSError), (esft.DivergenceError, ArithmeticError)],
)
def test_every_error_is_the_packages_and_a_standard_one_with_its_message(kind: type[Exception], standard):
    for base in (standard, esft.ESFTError):  # a caller who knows nothing of this package can catch it too
        with pytest.raises(base, match=r"^a\.json: line 3: no$"):
            raise kind("a.json: line 3: no")
    assert not issubclass(esft.InputError, OSError) and not issubclass(esft.DiskError, ValueError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one  "),
        (ValueError(" \n"), "ValueError"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_is_said_by_its_first_line_or_its_kind(error: Exception, line: str):
    assert first_line(error) == line
