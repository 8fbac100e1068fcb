"""The public calls: there at once, loaded when used."""

import importlib

import pytest

import esft
from esft import api


@pytest.mark.parametrize("name", api.__all__)
def test_a_public_name_is_the_call_though_a_module_has_its_name(name: str):
    if name in ("merge", "swap", "train"):
        importlib.import_module(f"esft.{name}")
    assert getattr(esft, name) is getattr(api, name)
    assert callable(getattr(esft, name))


def test_a_name_that_there_is_not_is_named():
    with pytest.raises(AttributeError, match="no_such_call"):
        _ = esft.no_such_call


def test_everything_public_comes_with_a_star():
    names: dict = {}
    exec("from esft import *", names)
    assert set(api.__all__) <= names.keys()
