import pytest

from esft_kernels.formats.resolve import FORMATS, resolve_format


def test_formats_are_found_by_their_names():
    assert list(FORMATS) == ["int8", "nf4", "nf4_double", "fp8", "mxfp4"]
    for name, kind in FORMATS.items():
        assert kind.name == name and resolve_format(name) is kind


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="^format must be one of int8, nf4, .*, got 'gptq'$"):
        resolve_format("gptq")
