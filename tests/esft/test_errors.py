import pytest

import esft
from esft.errors import InputError


def test_bad_input_is_a_value_error_of_the_package_with_its_message():
    assert esft.InputError is InputError
    assert InputError.__mro__[1] is ValueError  # so that a caller who knows nothing of this package can catch it
    with pytest.raises(ValueError, match=r"^a\.json: line 3: no$"):
        raise InputError("a.json: line 3: no")
