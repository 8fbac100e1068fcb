"""Small text skills on words and lists: copying, ordering, spelling, counting, editing; and the frame of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from examples.pretrain.instruction_words import (
    ANIMALS,
    CITIES,
    COLORS,
    FIRST,
    MONTHS,
    NOUNS,
    Lexicon,
    capital,
    code,
    digits,
    expand,
    letters,
    listing,
    novel,
    number_words,
    ordinal,
    pick,
    piece,
    word,
    words,
)

Kind = Callable[[Random, Lexicon], tuple[str, str]]
KINDS: dict[str, Kind] = {}
WEIGHTS: dict[str, float] = {}
FRAMES = (
    "{i}: {c}|{i}: {c}|{i}: {c}|{i}:\n{c}|{i}.\n{c}|{i}: {q}|{i}.\nText: {c}|{i}.\n\nInput: "
    "{c}|{c}\n\n{i}.|Input: {c}\nTask: {i}"
).split("|")  # fmt: skip


def frame(rng: Random, instruction: str, content: str) -> str:
    """Join an instruction and its content in one of many layouts."""
    if not content:
        return capital(instruction) + pick(
            rng, [".", "", "", "?"] if instruction[:2] in ("wh", "ho") else [".", "", ""]
        )
    if rng.random() < 0.06:
        instruction = "please " + instruction
    i = instruction if rng.random() < 0.12 else capital(instruction)
    return (
        pick(rng, FRAMES)
        .replace("{i}.", i if i[-1] == "?" else i + ".")
        .replace("{i}", i)
        .replace("{q}", f'"{content}"')
        .replace("{c}", content)
    )


def kind(weight: float, *patterns: str):
    """Register a generator of (parameters of the instruction, content, answer)."""

    def register(make: Callable[[Random, Lexicon], tuple[dict, str, str]]) -> Kind:
        def run(rng: Random, lex: Lexicon) -> tuple[str, str]:
            params, content, answer = make(rng, lex)
            instruction = expand(rng, pick(rng, patterns))
            return frame(rng, instruction.format_map(params) if params else instruction, content), answer

        name = make.__name__.strip("_")
        KINDS[name], WEIGHTS[name] = run, weight
        return run

    return register


def mixed(rng: Random, lex: Lexicon, low: int, high: int) -> list[str]:
    """A list of words, made-up words, names, codes or digits: one sort or a mixture."""
    makers = (
        lambda: word(rng, lex), lambda: word(rng, lex), lambda: novel(rng), lambda: letters(rng), lambda: digits(rng),
        lambda: code(rng), lambda: pick(rng, FIRST), lambda: pick(rng, CITIES).replace(" ", ""),
        lambda: piece(rng, lex),
    )  # fmt: skip
    make = None if rng.random() < 0.3 else pick(rng, makers)
    return [(make or pick(rng, makers))() for _ in range(rng.randint(low, high))]


SUBJECTS = "(the|a|my|our) [(old|young|quiet|famous)] (teacher|neighbour|farmer|captain|student|artist|{name}|{word})"
SENTENCES = (
    SUBJECTS + " (found|lost|carried|bought|painted|forgot|described) (a|the|two|three) {word} "
    "(near|behind|under|without) the {word}",
    "{name} (said|thought|wrote) that the {word} (is|was|looked) {word}",
    "the {word} of {city} (was|is) (known|famous|noted) for its {word} and {word}",
    "in {month} {name} (went|travelled|moved) to {city} with (a|one) {color} {noun}",
    "(every|each|one) {word} (needs|has|wants) (a|some) {word}, but {name} (has|likes) {word}",
    "a {color} {animal} (slept|waited|jumped) (near|over|beside) the {noun}",
)


def sentence(rng: Random, lex: Lexicon) -> str:
    """A short sentence with random words in it."""
    text = expand(rng, pick(rng, SENTENCES))
    fills = {"name": FIRST, "city": CITIES, "month": MONTHS, "color": COLORS, "noun": NOUNS, "animal": ANIMALS}
    while "{" in text:
        name = text[text.index("{") + 1 : text.index("}")]
        text = text.replace("{" + name + "}", pick(rng, fills[name]) if name in fills else word(rng, lex), 1)
    return capital(text) + pick(rng, [".", ".", "", "!"])


@kind(
    5,
    "repeat [exactly|after me]",
    "copy (this|the text) [exactly]",
    "say (this|it) (again|back)",
    "echo",
    "write (this|the same text) again",
    "(output|return) the (text|input) unchanged",
    "reproduce the (following|text)",
    "repeat the following text",
)
def copy_text(rng, lex):
    x = rng.random()
    text = (
        sentence(rng, lex)
        if x < 0.6
        else f"{sentence(rng, lex)} {sentence(rng, lex)}"
        if x < 0.8
        else " ".join(mixed(rng, lex, 2, 10))
    )
    return {}, text, text


@kind(
    10,
    "repeat",
    "repeat (these|the) (words|tokens|items)",
    "copy (these|the) (words|tokens) [exactly]",
    "echo (these|the tokens)",
    "say (these|the words) back [to me]",
    "repeat this [text|list] (exactly|word for word)",
    "write the (same words|list) again",
)
def copy_tokens(rng, lex):
    n = rng.randint(3, 14)
    text = " ".join([piece(rng, lex) for _ in range(n)] if rng.random() < 0.7 else mixed(rng, lex, n, n))
    return {}, text, text


@kind(
    2,
    "repeat (this|the) {s} {n} times",
    "write it {n} times",
    "say this {n} times",
    "{n} times the text",
    "output the text {n} times, with spaces",
)
def repeat_times(rng, lex):
    n, text = rng.randint(2, 5), pick(rng, mixed(rng, lex, 1, 2))
    return {"n": number_words(n) if rng.random() < 0.5 else n, "s": "text"}, text, " ".join([text] * n)


@kind(
    3,
    "(give|write|what is|quote|return) the {k} word",
    "{k} word",
    "which word is {k}",
    "find the {k} word",
    "word number {n}",
    "copy only word {n}",
)
def kth_word(rng, lex):
    items = mixed(rng, lex, 3, 9)
    k = rng.randint(1, min(len(items), 7))
    return {"k": ordinal(k), "n": k}, " ".join(items), items[k - 1]


@kind(
    2,
    "(give|write|return|what is) the {k} (word|item)",
    "{k} word only",
    "copy only the {k} word",
    "take the {k} item",
    "keep the {k} word",
)
def first_last(rng, lex):
    items, k = mixed(rng, lex, 3, 12), pick(rng, ["first", "last", "second to last"])
    return {"k": k}, " ".join(items), items[{"first": 0, "last": -1}.get(k, -2)]


@kind(
    2,
    "(give|copy|write|keep) the {k} {n} words",
    "the {k} {n} words (only|are)",
    "return only the {k} {n} words",
    "{k} {n} words",
    "quote the {k} {n} words",
)
def first_n(rng, lex):
    items, k, n = mixed(rng, lex, 4, 12), pick(rng, ["first", "last"]), rng.randint(2, 4)
    return (
        {"k": k, "n": number_words(n) if rng.random() < 0.6 else n},
        " ".join(items),
        " ".join(items[:n] if k == "first" else items[-n:]),
    )


@kind(
    2,
    "reverse (the|this) (list|order)",
    "write the (list|words|items) backwards",
    "list these in reverse order",
    "reverse the order of the items",
    "last to first",
)
def reverse_list(rng, lex):
    items = mixed(rng, lex, 3, 7)
    text, sep = listing(rng, items)
    return {}, text, sep.join(items[::-1])


@kind(
    2,
    "(write|put|convert) [this|it|the text] (in|to) {case}",
    "make (this|it) {case}",
    "change to {case}",
    "{case}",
    "rewrite in {case}",
)
def change_case(rng, lex):
    text = sentence(rng, lex) if rng.random() < 0.6 else " ".join(mixed(rng, lex, 2, 6))
    k = int(rng.random() * 3)
    names = (
        ("upper case", "capital letters", "capitals"),
        ("lower case", "small letters"),
        ("title case", "words with capital initials"),
    )
    return (
        {"case": pick(rng, names[k])},
        text,
        (text.upper(), text.lower(), " ".join(capital(w) for w in text.lower().split(" ")))[k],
    )


@kind(
    2,
    "spell (it|this|the word) with {s}",
    "write the letters of (this|the word) with {s} between",
    "separate the letters (with|by) {s}",
    "spell letter by letter ({s})",
    "put {s} between the letters",
)
def spell(rng, lex):
    text = word(rng, lex) if rng.random() < 0.6 else pick(rng, mixed(rng, lex, 1, 1))
    name = pick(rng, ["dashes", "dashes", "spaces", "commas", "dots"])
    return {"s": name}, text, {"dashes": "-", "spaces": " ", "commas": ", ", "dots": "."}[name].join(text)


@kind(
    1.5,
    "join the letters",
    "make one word of (these|the) letters",
    "remove the {s} and write the word",
    "which word is spelled [here]",
    "put the letters together",
)
def join_letters(rng, lex):
    text, (sep, name) = word(rng, lex), pick(rng, [("-", "dashes"), (" ", "spaces"), (", ", "commas"), (".", "dots")])
    return {"s": name}, sep.join(text), text


@kind(
    1.5,
    "how many (words|items) [are there]",
    "count the (words|items)",
    "number of (words|items)",
    "give the number of (items|words)",
    "count [these]",
)
def count_items(rng, lex):
    items = mixed(rng, lex, 1, 9)
    return {}, listing(rng, items)[0], str(len(items))


@kind(
    1,
    "how many letters [are in the word]",
    "count the letters",
    "number of letters",
    "length of the word",
    "letter count",
)
def count_letters(rng, lex):
    text = word(rng, lex)
    return {}, text, str(len(text))


@kind(
    1.5,
    'how many times does "{w}" (appear|occur)',
    'count the word "{w}"',
    'how often is "{w}" in the list',
    'count every "{w}"',
    'number of times "{w}" is said',
)
def count_word(rng, lex):
    pool = words(rng, lex, 2, 4)
    items = [pick(rng, pool) for _ in range(rng.randint(3, 9))]
    return {"w": pool[0]}, " ".join(items), str(items.count(pool[0]))


@kind(
    2,
    "sort [these|the words] (alphabetically|from a to z)",
    "put (these|the words) in alphabetical order",
    "alphabetical order",
    "order [the list] by alphabet",
    "sort the (list|words)",
)
def sort_words(rng, lex):
    items = words(rng, lex, 2, 6) if rng.random() < 0.7 else rng.sample(FIRST, rng.randint(2, 6))
    text, sep = listing(rng, items)
    return {}, text, sep.join(sorted(items))


@kind(
    2,
    "sort [the numbers] {o}",
    "order the numbers {o}",
    "put [these|the numbers] in order, {o}",
    "arrange {o}",
    "numbers {o}",
)
def sort_numbers(rng, lex):
    items = rng.sample(range(rng.choice([10, 100, 100, 1000])), rng.randint(2, 7))
    text, sep = listing(rng, [str(x) for x in items])
    up = rng.random() < 0.6
    name = pick(
        rng,
        ["ascending", "from small to large", "smallest first"]
        if up
        else ["descending", "from large to small", "largest first"],
    )
    return {"o": name}, text, sep.join(str(x) for x in sorted(items, reverse=not up))


@kind(
    1.5,
    "which (is|number is) the {o}",
    "(give|find|what is) the {o} [number|one]",
    "{o} number",
    "pick the {o} number",
    "the {o} of these",
)
def extreme(rng, lex):
    items = rng.sample(range(rng.choice([20, 100, 1000])), rng.randint(2, 6))
    up = rng.random() < 0.5
    return (
        {"o": "largest" if up else "smallest"},
        listing(rng, [str(x) for x in items])[0],
        str(max(items) if up else min(items)),
    )


@kind(
    1.5,
    "which word comes first in the (alphabet|dictionary)",
    "alphabetically first [word]",
    "which is first in alphabetical order",
    "(pick|give) the first word by alphabet",
    "first in the alphabet",
)
def alphabet_first(rng, lex):
    items = words(rng, lex, 2, 5)
    return {}, listing(rng, items)[0], min(items)


@kind(
    3,
    'replace "{a}" (by|with) "{b}"',
    'change "{a}" (to|into) "{b}"',
    'write "{b}" instead of "{a}"',
    "replace {a} with {b}",
    "put {b} in place of {a}",
)
def replace_word(rng, lex):
    items, b = (
        mixed(rng, lex, 3, 9) if rng.random() < 0.5 else sentence(rng, lex).split(" "),
        pick(rng, mixed(rng, lex, 1, 1)),
    )
    a = pick(rng, items)
    return {"a": a, "b": b}, " ".join(items), " ".join(b if x == a else x for x in items)


@kind(
    2,
    '(delete|remove|drop) [the word] "{a}"',
    "(remove|delete) {a}",
    'write it without "{a}"',
    "leave out {a}",
    'take "{a}" out',
)
def delete_word(rng, lex):
    items = mixed(rng, lex, 3, 9) if rng.random() < 0.5 else sentence(rng, lex).split(" ")
    a = pick(rng, items)
    return {"a": a}, " ".join(items), " ".join(x for x in items if x != a) or a


@kind(
    2,
    "swap {a} and {b}",
    'exchange "{a}" and "{b}"',
    "swap the (words|places of) {a} and {b}",
    "let {a} and {b} change places",
    'switch "{a}" with "{b}"',
)
def swap_words(rng, lex):
    items = words(rng, lex, 3, 7)
    i, j = rng.sample(range(len(items)), 2)
    a, b, text = items[i], items[j], " ".join(items)
    items[i], items[j] = b, a
    return {"a": a, "b": b}, text, " ".join(items)


@kind(
    2,
    'add "{a}" (at|to) the {e}',
    "put {a} at the {e}",
    'write the text with "{a}" at the {e}',
    "insert {a} at the {e}",
    'attach "{a}" to the {e}',
)
def add_word(rng, lex):
    items, a, end = mixed(rng, lex, 2, 8), word(rng, lex), pick(rng, ["beginning", "start", "end", "end"])
    return {"a": a, "e": end}, " ".join(items), " ".join([*items, a] if end == "end" else [a, *items])


@kind(
    2,
    'does the text contain "{w}"',
    'is "{w}" in the text',
    'yes or no: is there "{w}"',
    'can you find "{w}" here',
    'does "{w}" occur',
)
def contains(rng, lex):
    items = mixed(rng, lex, 3, 9) if rng.random() < 0.5 else sentence(rng, lex).strip(".!").split(" ")
    w = pick(rng, items) if rng.random() < 0.5 else word(rng, lex)
    return {"w": w}, " ".join(items), "yes" if w in items else "no"


@kind(
    2,
    "what (comes|is) after {w}",
    'which word follows "{w}"',
    "the word after {w}",
    'find the word (right after|following) "{w}"',
    "next word after {w}",
)
def after_word(rng, lex):
    items = list(dict.fromkeys(mixed(rng, lex, 4, 9)))
    i = int(rng.random() * max(1, len(items) - 1))
    return {"w": items[i]}, " ".join(items), items[min(i + 1, len(items) - 1)]


@kind(
    2,
    "copy (the text|what is) between {a} and {b}",
    'what is between "{a}" and "{b}"',
    "extract everything between {a} and {b}",
    "give the words between {a} and {b}",
    "quote from after {a} to before {b}",
)
def between(rng, lex):
    items = words(rng, lex, 5, 11)
    i = rng.randint(0, len(items) - 3)
    j = rng.randint(i + 2, min(len(items) - 1, i + 5))
    return {"a": items[i], "b": items[j]}, " ".join(items), " ".join(items[i + 1 : j])


@kind(
    2,
    "copy the text in (quotes|quotation marks)",
    "what is in quotes",
    "extract the quoted text",
    "give only the quotation",
    "write the part in quotation marks",
)
def quoted(rng, lex):
    text = " ".join(mixed(rng, lex, 1, 5))
    return (
        {},
        expand(rng, "(the (sign|note|label|page)|{n}) (said|reads|was)").replace("{n}", pick(rng, FIRST))
        + f' "{text}" '
        + " ".join(mixed(rng, lex, 1, 3)),
        text,
    )
