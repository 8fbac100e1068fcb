"""What a file or a command line says becomes a setting's value, or is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest

from esft.errors import InputError
from esft.runs.setting import check_setting, converted, setting


@dataclass
class Few:
    share: float = setting(0.5, "a share", "(0, 1]")
    count: int = setting(1, "how many", "[1, 2**63)")
    most: float | None = setting(None, "at most", "[0, inf]")
    kind: str = setting("a", "which", choices=("a", "b"))
    name: str = setting("x", "any text")
    on: bool = setting(False, "whether")


FIELDS = {each.name: each for each in fields(Few)}


@pytest.mark.parametrize(
    ("name", "said", "value"),
    [
        ("share", "1", 1.0), ("share", "2.5e-1", 0.25), ("share", 1, 1.0), ("share", ".5", 0.5),
        ("count", "3", 3), ("count", "3.0", 3), ("count", 3.0, 3), ("count", "+7", 7),
        ("most", ".inf", math.inf), ("most", "inf", math.inf), ("most", None, None), ("most", "0e-5", 0.0),
        ("kind", "b", "b"), ("name", "12", "12"), ("on", "true", True), ("on", "false", False),
        ("on", "True", True), ("on", "FALSE", False), ("on", True, True),
    ],
)  # fmt: skip
def test_a_text_becomes_a_value_of_the_settings_kind(name: str, said, value):
    found = converted(FIELDS[name], said, "here")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("share", "0", r"be in \(0, 1\], got 0"), ("share", "1.01", r"be in \(0, 1\], got 1.01"),
        ("share", "1_0", "be float"),
        ("share", "nan", "be float"), ("share", "1e-9999", "be float, got '1e-9999'"), ("share", True, "be float"),
        ("share", None, "be float, got None"), ("count", "0", r"be in \[1, 2\*\*63\), got 0"),
        ("count", "2.5", "be int"),
        ("count", str(2**63), r"be in \[1, 2\*\*63\)"), ("count", 2.5, "be int, got 2.5"), ("count", [1], "be int"),
        ("count", "1" * 401, "be int"), ("most", "-1", r"be in \[0, inf\], got -1"),
        ("kind", "c", "be one of a, b, got 'c'"),
        ("name", 12, "be str, got 12"), ("on", "yes", "be bool, got 'yes'"), ("on", None, "be bool"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_or_out_of_range_is_named(name: str, said, message: str):
    with pytest.raises(InputError, match=f"^here must {message}"):
        converted(FIELDS[name], said, "here")


def test_the_ends_of_an_interval_are_in_it_where_the_bracket_is_square():
    check_setting(FIELDS["share"], 1.0, "share")
    check_setting(FIELDS["most"], math.inf, "most")
    for name, value in (("share", 0.0), ("count", 2**63), ("on", 1)):
        with pytest.raises(InputError, match=f"^{name} must be"):
            check_setting(FIELDS[name], value, name)
    with pytest.raises(InputError, match=r"^most must be in \[0, inf\], got -0.5$"):
        check_setting(FIELDS["most"], -0.5, "most")
