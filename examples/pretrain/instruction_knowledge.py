"""Small skills on meaning: categories, languages, definitions, sequences, numbers, dates, rules, passages, tables."""

from __future__ import annotations

import json
from collections.abc import Callable

from examples.pretrain.instruction_kinds import kind, mixed, sentence
from examples.pretrain.instruction_words import (
    CITIES,
    COLORS,
    DAYS,
    FIRST,
    LETTERS,
    MONTHS,
    NOUNS,
    TOPICS,
    capital,
    digits,
    expand,
    listing,
    novel,
    number_words,
    pick,
    word,
    words,
)


@kind(
    1.5,
    "which (one|word) does not (belong|fit)",
    "find the odd one out",
    "odd one out",
    "pick the one that is different",
    "which item is of another kind",
)
def odd_one_out(rng, lex):
    a, b = rng.sample(list(TOPICS), 2)
    items, odd = rng.sample(TOPICS[a], 3), pick(rng, TOPICS[b])
    if rng.random() < 0.3:
        items, odd = (
            ([digits(rng) for _ in range(3)], word(rng, lex))
            if rng.random() < 0.5
            else ([word(rng, lex) for _ in range(3)], digits(rng))
        )
    items = items + [odd]
    rng.shuffle(items)
    return {}, listing(rng, items)[0], odd


@kind(
    1.5,
    "(what|which) (kind of thing|category) is this: {o}",
    "classify as {o}",
    "choose the category ({o})",
    "is this {o}",
    "label with one of {o}",
)
def topic(rng, lex):
    names = rng.sample(list(TOPICS), rng.randint(2, 4))
    name = names[0]
    rng.shuffle(names)
    x, y = rng.sample(TOPICS[name], 2)
    text = pick(rng, [x, x, f"{x}, {y}", f"{x} and {y}", f"We talked about the {x} and the {y}."])
    return {"o": ", ".join(names[:-1]) + " or " + names[-1]}, text, name


GOOD = "(wonderful|excellent|great|lovely|fantastic|delightful|perfect|amazing|very good|charming)"
BAD = "(terrible|awful|bad|boring|horrible|disappointing|dreadful|poor|very bad|annoying)"


@kind(
    1.5,
    "is this positive or negative",
    "sentiment (positive or negative)",
    "classify the (sentiment|review): positive or negative",
    "(good|happy) or bad opinion? answer positive or negative",
    "does the writer like it? say positive or negative",
)
def sentiment(rng, lex):
    good = rng.random() < 0.5
    text = expand(
        rng,
        "((the|this) {a} (was|is) X[ and the {b} was X]|X {a}, {n} (agrees|says so too)|{n} found the {a} "
        "X|what a X {a})",
    )
    text = text.replace("X", expand(rng, GOOD if good else BAD)).format(
        a=word(rng, lex), b=word(rng, lex), n=pick(rng, FIRST)
    )
    return {}, capital(text), "positive" if good else "negative"


LANGUAGES = {
    "English": "(the|my|this) (dog|house|child|car|book|friend) (is|was) [not] [very] (old|small|here|good|new)",
    "German": "(der|mein|dieser) (Hund|Tisch|Freund|Wagen|Baum|Vater) (ist|war) [nicht] [sehr] "
    "(alt|klein|hier|gut|neu)",
    "French": "(le|mon|ce) (chien|livre|jardin|vélo|père|frère) (est|était) [très] (vieux|petit|ici|bon|nouveau)",
    "Spanish": "(el|mi|este) (perro|libro|amigo|coche|padre|árbol) [no] (es|era) [muy] "
    "(viejo|pequeño|bueno|nuevo|alto)",
    "Italian": "(il|questo) (cane|libro|treno|padre|fiore) [non] (è|era) [molto] (vecchio|piccolo|buono|nuovo|bello)",
}  # fmt: skip


@kind(
    1,
    "which language is this",
    "(name|what is) the language",
    "language of the (sentence|text)",
    "in which language is this [written]",
    "detect the language",
)
def language(rng, lex):
    name = pick(rng, list(LANGUAGES))
    return {}, capital(expand(rng, LANGUAGES[name])) + pick(rng, [".", "", "!", " " + novel(rng) + "."]), name


@kind(
    2,
    "translate (to|into) {l}",
    "what is this in {l}",
    "{l} (word|translation)",
    "how do you say this in {l}",
    "say it in {l}",
    "English to {l}",
)
def translate(rng, lex):
    name = pick(rng, list(lex.translations))
    en, other = pick(rng, lex.translations[name])
    return {"l": name}, en, other


@kind(
    1,
    "translate from {l} to English",
    "what does this {l} word mean in English",
    "{l} to English",
    "say this {l} word in English",
    "English translation of the {l} word",
)
def translate_back(rng, lex):
    name = pick(rng, list(lex.translations))
    en, other = pick(rng, lex.translations[name])
    return {"l": name}, other, en


@kind(
    1.5,
    "define [the word|this word]",
    "what does this [word] mean",
    "(give|write) a definition",
    "meaning of the word",
    "explain the word",
)
def define(rng, lex):
    w, _, gloss = pick(rng, lex.glosses)
    return {}, w, gloss


@kind(
    1,
    "which word (means this|is defined)",
    "(find|give) the word for (this definition|the meaning)",
    "what is the word",
    "name the word that means",
    "word for this meaning, starting with {a}",
)
def word_of_gloss(rng, lex):
    w, _, gloss = pick(rng, lex.glosses)
    return {"a": w[0]}, gloss, w


@kind(
    1,
    "part of speech",
    "is it a noun, verb, adjective or adverb",
    "which part of speech is this",
    "word class",
    "give the part of speech of the (word|entry)",
)
def part_of_speech(rng, lex):
    w, pos, gloss = pick(rng, lex.glosses)
    return {}, w if rng.random() < 0.3 else f"{w}: {gloss}", pos


@kind(
    2,
    "continue [the sequence]",
    "what comes next",
    "(give|write) the next (item|one)",
    "next in the (row|sequence)",
    "continue with one more",
)
def continue_sequence(rng, lex):
    x, n = rng.random(), rng.randint(3, 5)
    if x < 0.4:
        step, start = rng.choice([1, 2, 3, 5, 10, -1, -2, 100]), rng.randint(10, 300)
        items = [str(start + step * i) for i in range(n + 1)]
    elif x < 0.8:
        ring = pick(rng, [list(LETTERS), list(LETTERS.upper()), DAYS, MONTHS])
        i = rng.randint(0, len(ring) - 1)
        items = [ring[(i + j) % len(ring)] for j in range(n + 1)]
    else:
        cycle = words(rng, lex, 2, 3)
        items = [cycle[j % len(cycle)] for j in range(n + 3)]
    sep = pick(rng, [", ", " ", ", "])
    return {}, sep.join(items[:-1]), items[-1]


@kind(
    2,
    "which {s} comes {w} {x}",
    "what is the {s} {w} {x}",
    "name the {s} {w} {x}",
    "{s} {w} {x}",
    "the {s} just {w} {x}",
)
def neighbour(rng, lex):
    s, ring = pick(
        rng, [("letter", list(LETTERS)), ("day", DAYS), ("month", MONTHS), ("number", [str(i) for i in range(1, 200)])]
    )
    i, back = rng.randint(1, len(ring) - 2), rng.random() < 0.4
    return {"s": s, "w": "before" if back else "after", "x": ring[i]}, "", ring[i - 1 if back else i + 1]


@kind(
    2.5,
    "fill (in the blank|the gap) (from|using) the text",
    "complete the second line from the first",
    "what word is missing in line two",
    "find the missing word",
    "which word replaces ___",
)
def fill_blank(rng, lex):
    items = sentence(rng, lex).split(" ") if rng.random() < 0.6 else mixed(rng, lex, 4, 9)
    i = int(rng.random() * len(items))
    return {}, " ".join(items) + "\n" + " ".join([*items[:i], "___", *items[i + 1 :]]), items[i]


@kind(
    2,
    "write (as digits|in digits|the number in figures)",
    "(number|words) to digits",
    "convert to a number",
    "in figures",
    "which number is this, in digits",
)
def words_to_digits(rng, lex):
    n = rng.randint(0, rng.choice([20, 100, 100, 1000, 9999]))
    return {}, number_words(n), str(n)


@kind(
    1.5,
    "write (in|as) words",
    "(number|digits) to words",
    "spell out the number",
    "write the number in words",
    "say this number in words",
)
def digits_to_words(rng, lex):
    n = rng.randint(0, rng.choice([20, 100, 100, 1000, 9999]))
    return {}, str(n), number_words(n)


@kind(
    2,
    "write the date as {f}",
    "(convert|change) the date to {f}",
    "date in the form {f}",
    "format as {f}",
    "rewrite the date ({f})",
)
def date_format(rng, lex):
    y, m, d = rng.randint(1900, 2049), rng.randint(1, 12), rng.randint(1, 28)
    forms = {"YYYY-MM-DD": f"{y}-{m:02}-{d:02}", "DD.MM.YYYY": f"{d:02}.{m:02}.{y}",
    "MM/DD/YYYY": f"{m:02}/{d:02}/{y}", "day month year": f"{d} {MONTHS[m - 1]} {y}",
             "month day, year": f"{MONTHS[m - 1]} {d}, {y}"}  # fmt: skip
    a, b = rng.sample(list(forms), 2)
    return {"f": b}, forms[a] + (f" ({a})" if a == "MM/DD/YYYY" else ""), forms[b]


PATTERNS: dict[str, Callable[[str], str]] = {
    "upper": str.upper, "title": str.capitalize, "first letter": lambda w: w[0], "last letter": lambda w: w[-1],
    "double": lambda w: f"{w} {w}", "length": lambda w: str(len(w)), "spell": "-".join, "bracket": lambda w: f"[{w}]",
    "plural": lambda w: w + "s", "hash": lambda w: "#" + w, "key": lambda w: f"{w}={w}",
    "json": lambda w: json.dumps({"value": w}),
    "same": lambda w: w, "first two": lambda w: w[:2], "initial": lambda w: f"{w[0]}. {w}", "quote": lambda w: f'"{w}"',
}  # fmt: skip


@kind(
    5,
    "(follow|continue) the pattern",
    "apply the same rule",
    "find the rule and complete the last line",
    "complete",
    "same pattern",
)
def few_shot(rng, lex):
    x, n = rng.random(), rng.randint(2, 4)
    if x < 0.5:
        rule, items = PATTERNS[pick(rng, list(PATTERNS))], words(rng, lex, n + 1, n + 1)
        pairs = [(w, rule(w)) for w in items]
    elif x < 0.65:
        name = pick(rng, list(lex.translations))
        pairs = rng.sample(lex.translations[name], n + 1)
    elif x < 0.8:
        pairs = [(w, name) for name in rng.sample(list(TOPICS), n + 1) for w in [pick(rng, TOPICS[name])]]
    else:
        k = rng.randint(2, 4)
        orders = rng.sample(range(k), rng.randint(1, k))
        rows = [words(rng, lex, k, k) for _ in range(n + 1)]
        pairs = [(" ".join(r), " ".join(r[i] for i in orders)) for r in rows]
    arrow, end = pick(rng, [(" -> ", "\n"), (" => ", "\n"), (": ", "\n"), (" = ", "\n"), ("\nAnswer: ", "\n\n")])
    return {}, end.join(a + arrow + b for a, b in pairs[:-1]) + end + pairs[-1][0] + arrow.rstrip(), pairs[-1][1]


@kind(
    3,
    "(use the rule|look up|with this code): {m}. (Write|Give|Say) the (meaning|value) of each",
    "code book: {m}. decode",
    "given {m}, rewrite",
    "{m}. apply this to",
    "mapping {m}. translate",
)
def mapping(rng, lex):
    keys, values = words(rng, lex, 2, 5), mixed(rng, lex, 5, 5)
    sep = pick(rng, [" = ", " means ", " -> ", "="])
    asked = [pick(rng, range(len(keys))) for _ in range(rng.randint(1, 3))]
    table = ", ".join(f"{k}{sep}{v}" for k, v in zip(keys, values, strict=False))
    return {"m": table}, " ".join(keys[i] for i in asked), " ".join(values[i] for i in asked)


HAVE = "(has|owns|holds|took|likes|brought|found)"


@kind(
    4,
    "answer from the (text|facts): {q}",
    "{q}",
    "(read and answer|question): {q}",
    "{q} Answer (briefly|in one or two words)",
    "use the text. {q}",
)
def passage_question(rng, lex):
    n = rng.randint(2, 5)
    names = [capital(novel(rng)) if rng.random() < 0.3 else x for x in rng.sample(FIRST, n)]
    colors, things = rng.sample(COLORS, n), [pick(rng, NOUNS) if rng.random() < 0.7 else novel(rng) for _ in range(n)]
    cities = [capital(novel(rng)) if rng.random() < 0.3 else city for city in rng.sample(CITIES, n)]
    verb = expand(rng, HAVE)
    i = int(rng.random() * n)
    if rng.random() < 0.5:
        text = " ".join(f"{a} {verb} the {b} {c}." for a, b, c in zip(names, colors, things, strict=True))
        verbs = {
            "has": "have",
            "owns": "own",
            "holds": "hold",
            "took": "take",
            "likes": "like",
            "brought": "bring",
            "found": "find",
        }
        aux = "did" if verb in ("took", "brought", "found") else "does"
        q, a = pick(
            rng,
            [
                (f"Who {verb} the {colors[i]} {things[i]}?", names[i]),
                (f"What {aux} {names[i]} {verbs[verb]}?", f"the {colors[i]} {things[i]}"),
            ],
        )
    else:
        verb = pick(rng, ["lives in", "comes from", "works in", "flew to"])
        text = " ".join(f"{a} {verb} {c}." for a, c in zip(names, cities, strict=True))
        q, a = pick(
            rng,
            [
                (f"Who {verb} {cities[i]}?", names[cities.index(cities[i])]),
                (f"{names[i]} {verb} which place?", cities[i]),
            ],
        )
    return {"q": q}, text, a


@kind(
    3,
    "what is the {c} of {r}",
    "{c} of {r}",
    "look up the {c} of {r}",
    "from the table, give the {c} for {r}",
    "find {r} and give the {c}",
)
def table_lookup(rng, lex):
    n, cols = (
        rng.randint(2, 5),
        rng.sample(
            ["age", "city", "color", "code", "price", "room", "score", "owner", "size", "year"], rng.randint(1, 4)
        ),
    )
    rows = words(rng, lex, n, n)
    cells = [[pick(rng, mixed(rng, lex, 1, 1)) for _ in cols] for _ in rows]
    sep = pick(rng, [" | ", ", ", "\t", "; "])
    i, j = int(rng.random() * n), int(rng.random() * len(cols))
    table = "\n".join([sep.join(["name", *cols]), *(sep.join([r, *c]) for r, c in zip(rows, cells, strict=True))])
    return {"c": cols[j], "r": rows[i]}, table, cells[i][j]


@kind(
    2,
    "{u} in the (same|given) form",
    "use the form {t} for",
    "put the (values|words) into: {t}",
    "template: {t}. (values|fill with)",
    "fill {t} with",
)
def fill_template(rng, lex):
    keys = words(rng, lex, 1, 4)
    values = mixed(rng, lex, len(keys), len(keys))
    a, b = pick(rng, [("<", ">"), ("[", "]"), ("{", "}"), ("$", "")])
    gaps = [f"{a}{k}{b}" for k in keys]
    rng.shuffle(order := list(range(len(keys))))
    form = " ".join(f"{pick(rng, ['the', 'with', 'and', 'is', word(rng, lex)])} {gaps[i]}" for i in order)
    answer = form
    for gap, value in sorted(zip(gaps, values, strict=True), key=lambda p: -len(p[0])):
        answer = answer.replace(gap, value)
    return (
        {"t": form, "u": f"fill the template {form}"},
        ", ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True)),
        answer,
    )
