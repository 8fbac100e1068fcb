"""An answer's text, piece by piece as its tokens come."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from esft.cli.conversation import Stream
from tests.esft.models import tiny_tokenizer


def pieces(tokenizer, ids: list[int]) -> list[str]:
    shown = []
    stream = Stream(tokenizer, shown.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.ids == ids
    return shown


def test_a_piece_is_shown_as_soon_as_its_characters_are_whole():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("aé漢\n\U0001f600<|end|>")["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 1 + 4 + 1
    assert pieces(tokenizer, ids) == list("aé漢\n\U0001f600")


def test_bytes_that_never_become_a_character_are_shown_all_the_same():
    tokenizer = tiny_tokenizer()
    (lone,) = {tokenizer("é")["input_ids"][1]}
    shown = []
    stream = Stream(tokenizer, shown.append)
    for token in [[[0]], *[[lone]] * 5]:
        stream.put(torch.tensor(token))
    assert "".join(shown) == "\ufffd" * 2


@pytest.mark.parametrize("seed", range(5))
def test_together_the_pieces_are_the_text_of_all_tokens_also_of_bytes_that_are_none(seed: int):
    tokenizer = tiny_tokenizer()
    ids = torch.randint(0, 262, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_an_indented_line_keeps_its_spaces_where_a_tokenizer_drops_one_at_the_beginning():
    words = ["a", "\n", "▁▁▁▁b", "▁c", "<end>"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    built.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>")
    assert tokenizer.decode([2]) == "   b"
    assert pieces(tokenizer, [0, 1, 4, 2, 3]) == ["a", "\n", "    b", " c"]
