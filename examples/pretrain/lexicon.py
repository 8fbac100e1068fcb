"""Word lists for generated instructions: words, translations of one word by one word, short glosses."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.pretrain import parsers

# FreeDict pair -> (name of the languages, corpus domain whose words tell common translations from rare ones)
PAIRS = {
    "eng-deu": ("English - German", "debian_de"),
    "eng-fra": ("English - French", "debian_fr"),
    "eng-spa": ("English - Spanish", "debian_es"),
    "eng-ita": ("English - Italian", "debian_it"),
}


def freedict_pairs(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(English headword, translations) of a FreeDict dictionary, without phonetics and grammar marks."""
    for entry in parsers.dict_entries(root):
        head, *rest = entry.splitlines()
        word = re.sub(r"\s*/[^/]*/.*|\s*<.*", "", head).strip()
        senses = (re.sub(r"^\d+\.\s*|\s*(<[^>]*>|\[[^]]*\]|/[^/]*/|\([^)]*\))", "", line).strip() for line in rest)
        found = [part.strip() for sense in senses if not re.search(r'[":{]', sense) for part in re.split("[,;]", sense)]
        if word and any(found):
            yield word, [part for part in found if part]


def translations(root: Path, pattern: str) -> Iterator[parsers.Document]:
    """Translation lists, one `word: translations` line an entry; `pattern` names the two languages."""
    lines = (f"{word}: {', '.join(found[:4])}" for word, found in freedict_pairs(root) if len(word) < 30)
    for doc in parsers.pack(pattern, lines, 600):
        yield parsers.Document(doc.id, f"{pattern}\n" + doc.text.replace("\n\n", "\n"))


def wordnet_glosses(root: Path, known: set[str], max_chars: int = 80) -> Iterator[tuple[int, str, str, str]]:
    """(how often tagged in text, word, part of speech, gloss of its first sense) for known words in WordNet."""
    for pos in ("noun", "verb", "adj", "adv"):
        base = root / "usr/share/wordnet"
        data = (base / f"data.{pos}").read_bytes()
        for line in (base / f"index.{pos}").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if line.startswith(" ") or fields[0] not in known:
                continue
            senses, tagged, first = int(fields[2]), int(fields[-int(fields[2]) - 1]), int(fields[-int(fields[2])])
            text = data[first : data.index(b"\n", first)].decode("utf-8", errors="ignore")
            gloss = re.sub(r"\([^)]*\)", "", text.split(" | ", 1)[1]).split(";")[0]
            gloss = " ".join(gloss.replace('"', "").split())
            if senses and 10 <= len(gloss) <= max_chars and fields[0] not in gloss.split():
                yield tagged, fields[0], pos, gloss


def frequencies(path: Path) -> Counter[str]:
    """How often each lower-case word occurs in a corpus file."""
    counts: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        counts.update(re.findall(r"\w+", json.loads(line)["text"].lower()))
    return counts


def word_pairs(root: Path, known: set[str], counts: Counter[str], max_chars: int = 12) -> dict[str, str]:
    """Known English word -> one common translation of one word.

    The first entry of a word may be a rare sense (the German dictionary is one turned round): of the translations
    that lead an entry, the one used most in the corpus and in the dictionary's phrases is taken.
    """
    entries = list(freedict_pairs(root))
    phrases = Counter(token.lower() for _, found in entries for phrase in found for token in phrase.split()[1:])

    def weight(candidate: str) -> int:
        return counts[candidate] + 3 * phrases[candidate]

    best: dict[str, str] = {}
    for word, found in entries:
        candidate = found[0].lower()
        if word not in known or not (candidate.isalpha() and 2 <= len(candidate) <= max_chars):
            continue
        if word not in best or weight(candidate) > weight(best[word]):
            best[word] = candidate
    return {word: best[word] for word in sorted(best) if best[word] != word}


def build_lexicon(extract: Callable[[str], Path], text_dir: Path, lexicon: Path) -> None:
    """Write words.txt, glosses.tsv (most used words first) and one <pair>.tsv a language pair, if not there yet."""
    lexicon.mkdir(exist_ok=True)
    if (lexicon / "glosses.tsv").exists():
        return
    words = parsers.read_text(extract("wamerican") / "usr/share/dict/american-english").split()
    words = sorted({word for word in words if re.fullmatch(r"[a-z]{3,10}", word)})
    (lexicon / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    glosses = sorted(wordnet_glosses(extract("wordnet-base"), set(words)), key=lambda g: (-g[0], g[1:]))
    used = {word for tagged, word, _, _ in glosses if tagged}
    for pair, (_, domain) in PAIRS.items():
        table = word_pairs(extract(f"dict-freedict-{pair}"), used, frequencies(text_dir / f"{domain}.train.jsonl"))
        rows = [f"{word}\t{translation}\n" for word, translation in table.items()]
        (lexicon / f"{pair}.tsv").write_text("".join(rows), encoding="utf-8")
    text = "".join(f"{word}\t{pos}\t{gloss}\n" for _, word, pos, gloss in glosses)
    (lexicon / "glosses.tsv").write_text(text, encoding="utf-8")
