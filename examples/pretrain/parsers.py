"""Turn what a Debian package or a Python installation ships into plain-text documents.

Every parser takes the folder that a package was extracted into and yields `Document`s; lengths, duplicates,
caps and the train/held-out split are the business of `examples.pretrain.corpus`.
"""

import gzip
import html.parser
import importlib.util
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

BASE64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
BULLET = re.compile(r"(\d+[.:)]|[-*•+] |(n|v|adj|adv) (\d+)?:)")
ENTRIES_CHARS = 1500  # dictionary entries are packed into documents of about this size


@dataclass(frozen=True)
class Document:
    """One document; documents with the same `group` (default: the text) fall on the same side of the split."""

    id: str
    text: str
    group: str = ""


def read_text(path: Path) -> str:
    """The text of a plain or gzip-compressed file; undecodable bytes are dropped."""
    data = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    return data.decode("utf-8", errors="ignore")


def reflow(text: str) -> str:
    """Join the hard-wrapped lines of each paragraph; list items and numbered senses keep a line of their own."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines: list[str] = []
        for line in (" ".join(raw.split()) for raw in block.splitlines()):
            if line and (not lines or BULLET.match(line)):
                lines.append(line)
            elif line:
                lines[-1] += " " + line
        paragraphs.append("\n".join(lines))
    return "\n\n".join(p for p in paragraphs if p)


def pack(name: str, entries: Iterable[str], size: int = ENTRIES_CHARS) -> Iterator[Document]:
    """Gather short entries into documents of about `size` characters."""
    batch: list[str] = []
    count = 0
    for entry in entries:
        batch.append(entry)
        if sum(map(len, batch)) >= size:
            yield Document(f"{name}/{count}", "\n\n".join(batch))
            batch, count = [], count + 1
    if batch:
        yield Document(f"{name}/{count}", "\n\n".join(batch))


def descriptions(text: str) -> Iterator[Document]:
    """Package descriptions from a Translation index: name, short description, reflowed long description.

    Packages of one family share their first paragraph, so that paragraph is the group of the split.
    """
    for stanza in text.split("\n\n"):
        match = re.match(r"Package: (\S+)\n.*?^Description-(?!md5)\w+: (.*?)\n(.*)", stanza, re.DOTALL | re.MULTILINE)
        if not match:
            continue
        name, short, body = match.groups()
        out: list[str] = []
        wrapped = False  # the previous line can be continued
        for line in body.splitlines():
            if line.strip() in (".", ""):
                out.append("")
            elif wrapped and out[-1] and not line.startswith("  ") and not BULLET.match(line.strip()):
                out[-1] += " " + line.strip()
            else:
                out.append(line.strip())
            wrapped = not line.startswith("  ") or bool(BULLET.match(line.strip()))
        long = "\n".join(out)
        yield Document(name, f"Package: {name}\n\n{short}\n\n{long}", long.split("\n\n")[0] or short)


SKIP = {"script", "style", "head", "nav", "form", "table", "sup"}
SKIP_CLASS = re.compile(r"(^|\s)(docnav|navheader|navfooter|related|footer|sphinxsidebar|toc)(\s|$)")
BLOCK = {"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "dt", "dd", "blockquote", "tr", "br"}


class _HtmlText(html.parser.HTMLParser):
    """Collects the visible text of a page, a blank line between blocks, `pre` kept as it is."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipped: str | None = None  # the tag of the element being skipped
        self.depth = 0  # how many elements of that tag are open
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped is None and (tag in SKIP or SKIP_CLASS.search(dict(attrs).get("class") or "")):
            self.skipped = tag
        self.depth += tag == self.skipped
        self.pre += tag == "pre"
        if tag in BLOCK:
            self.parts.append("\n" if tag in ("br", "li") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == self.skipped
        if not self.depth:
            self.skipped = None
        self.pre = max(0, self.pre - (tag == "pre"))
        if tag in BLOCK:
            self.parts.append("\n\n" if tag != "li" else "\n")

    def handle_data(self, data: str) -> None:
        if self.skipped is None:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """The visible text of an HTML page, without lines of navigation."""
    parser = _HtmlText()
    parser.feed(page)
    lines = "".join(parser.parts).replace("\u00a0", " ").replace("¶", "").splitlines()
    navigation = re.compile(r"\s*(Next|Prev|Previous|Up|Home|Chapter \d+\.?|Download the ebook)\s*$")
    return "\n".join(line.rstrip() for line in lines if not navigation.match(line))


def files(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """(relative name, text) of the files under `root` that match a glob pattern, in a fixed order."""
    for path in sorted(root.glob(pattern)):
        if path.is_file() and not path.is_symlink():
            yield str(path.relative_to(root)), read_text(path)


def html_pages(root: Path, pattern: str) -> Iterator[Document]:
    """Text of HTML pages; contents pages, with little running text, are left out."""
    for name, page in files(root, pattern):
        text = html_text(page)
        if sum(len(line) for line in text.splitlines() if len(line) > 120) > len(text) // 4:
            yield Document(name, text)


def rst_pages(root: Path, pattern: str) -> Iterator[Document]:
    """reStructuredText with roles reduced to their text and comments, labels and index entries dropped."""
    for name, text in files(root, pattern):
        text = re.sub(r"(?m)^\.\. (_.*:|index::.*|sectionauthor::.*|moduleauthor::.*|XXX.*|_.*)$", "", text)
        text = re.sub(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(<[^`]*>)?`", r"\1", text)
        yield Document(name, re.sub(r"``([^`]*)``", r"`\1`", text))


def pod_pages(root: Path, pattern: str) -> Iterator[Document]:
    """Perl's plain old documentation as text; release notes are left out."""
    for name, text in files(root, pattern):
        if re.search("delta|perltoc", name):
            continue
        text = re.sub(r"(?m)^=(over|back|cut|begin|end|for|encoding|pod|item \*).*$|^=\w+ ", "", text)
        for escape, char in (("E<lt>", "\0"), ("E<gt>", "\1"), ("E<sol>", "/"), ("E<verbar>", "\2")):
            text = text.replace(escape, char)
        text = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", text)
        for _ in range(3):
            text = re.sub(r"\b[BCFILSXZE]<{1,3}\s?([^<>]*?)\s?>{1,3}", r"\1", text)
        yield Document(name, text.translate({0: "<", 1: ">", 2: "|"}))


ROFF_CHARS = {"aq": "'", "bu": "*", "em": "--", "en": "-", "lq": '"', "rq": '"', "dq": '"', "oq": "'", "cq": "'",
              "co": "(c)", "ha": "^", "ti": "~", "rs": "\\", "->": "->", "<=": "<=", ">=": ">=", "mu": "x"}  # fmt: skip


def _roff_inline(line: str) -> str:
    """Replace the inline escapes of one roff line."""
    line = re.sub(r'\\".*', "", line)
    line = re.sub(
        r"\\[fmFM](\[[^]]*\]|\(..|.)|\\s[-+]?\d|\\\*(\[[^]]*\]|\(..|.)|\\[|^&%:/,c)]|\\[kvhw]'[^']*'", "", line
    )
    line = re.sub(r"\\\((..)|\\\[([^]]*)\]", lambda m: ROFF_CHARS.get(m[1] or m[2], ""), line)
    return re.sub(r"\\(.)", lambda m: {"e": "\\", "t": " ", "0": " ", "~": " "}.get(m[1], m[1]), line)


def roff_text(page: str) -> str:
    """A man page as text: headings, reflowed paragraphs and verbatim examples; tables and macros are dropped."""
    page = re.sub(r"(?ms)^\.(TS.*?^\.TE|de.*?^\.\.|ig.*?^\.\.)$", "", page)
    out: list[str] = []
    verbatim = joining = False
    for raw in page.splitlines():
        macro = re.match(r"[.']\s*([A-Za-z]\w*|\\\")?\s*(.*)", raw)
        line = _roff_inline(raw)
        if macro:
            name = macro[1] or ""
            words = [_roff_inline(q or w) for q, w in re.findall(r'"([^"]*)"|(\S+)', macro[2])]
            verbatim = name in ("nf", "EX") or (verbatim and name not in ("fi", "EE", "SH", "SS", "PP"))
            if name in ("SH", "SS", "PP", "P", "LP", "IP", "TP", "HP", "TQ", "nf", "EX", "fi", "EE", "sp"):
                out += [""]
                joining = False
            if name in ("SH", "SS"):
                out += [" ".join(words), ""]
            if name == "IP" and words and words[0]:
                out += [words[0]]
                joining = words[0] in "*-+o"
            if name in ("B", "I", "SM", "SB", "UR", "MT"):
                line = " ".join(words)
            elif len(name) == 2 and set(name) <= set("BIR"):
                line = "".join(words)
            else:
                continue
            if not words:  # the font applies to the next line
                continue
        if line.strip() in ("", "{\\"):
            out, joining = [*out, ""], False
        elif verbatim or not joining:
            out, joining = [*out, line.rstrip() if verbatim else line.strip()], not verbatim
        else:
            out[-1] += " " + line.strip()
    return "\n".join(out)


def man_pages(root: Path, pattern: str) -> Iterator[Document]:
    """Man pages in the `man` macros; the few in `mdoc` and mere redirections are left out."""
    for name, page in files(root, pattern):
        if not re.search(r"(?m)^\.(Dd|so) ", page):
            yield Document(name, roff_text(page))


def dict_entries(root: Path) -> Iterator[str]:
    """The entries of a dictd data base in file order, found through its index."""
    for index in sorted(root.glob("usr/share/dictd/*.index")):
        data = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
        spans = set()
        for line in index.read_text(encoding="utf-8").splitlines():
            word, *span = line.split("\t")
            if len(span) == 2 and not re.match(r"00-?database|00", word):
                start, length = (sum(BASE64[c] << 6 * i for i, c in enumerate(reversed(s))) for s in span)
                spans.add((start, length))
        for start, length in sorted(spans):
            yield data[start : start + length].decode("utf-8", errors="ignore").strip()


def dictionary(root: Path, pattern: str) -> Iterator[Document]:
    """Dictionary entries without pronunciation, etymology and link braces, packed into documents."""

    def clean(entry: str) -> str:
        entry = re.sub(r"\\[^\\\n]*\\|\([^()]*\[[^()]*\)", "", entry)
        syn = re.sub(r"\[syn: ([^]]*)\]", r"(synonyms: \1)", entry)
        for _ in range(3):
            syn = re.sub(r"\[[^][]*\]", "", syn)
        return reflow(re.sub(r"[{}]", "", syn)).replace(" ,", ",").replace("\n\n", "\n")

    return pack(pattern, filter(None, map(clean, dict_entries(root))))


def encyclopedia(root: Path, pattern: str) -> Iterator[Document]:
    """Longer dictd entries, such as those of FOLDOC, with their paragraphs kept."""
    noise = re.compile(r"[{}]|\[[^]]*\]|<[\w, ]+>")
    texts = (re.sub(r"(?m)^\s*[.,;]\s*$", "", noise.sub("", entry)) for entry in dict_entries(root))
    return pack(pattern, map(reflow, texts))


def fortunes(root: Path, pattern: str) -> Iterator[Document]:
    """Fortune cookies, packed; collections that are drawings or meant to offend are left out."""
    for name, text in files(root, pattern):
        if not re.search(r"art|ethnic|men-women|drugs|zippy|translate|/off|\.(u8|dat)$", name):
            yield from pack(name, (e.strip() for e in re.split(r"(?m)^%$", text) if "\x1b" not in e and "\b" not in e))


def r_strings(root: Path, pattern: str) -> Iterator[Document]:
    """Text vectors in the lazy-load data base of an R package (zlib records holding XDR-serialised strings)."""
    for path in sorted(root.glob(pattern)):
        data, count = path.read_bytes(), 0
        while len(data) > 4:
            inflate = zlib.decompressobj()
            record, lines, at = inflate.decompress(data[4:]), [], 0
            while (at := record.find(b"\x00\x04\x00\x09", at)) >= 0:
                length = int.from_bytes(record[at + 4 : at + 8], "big")
                lines.append(record[at + 8 : at + 8 + length].decode("utf-8", errors="ignore"))
                at += 8 + length
            yield Document(f"{path.name}/{count}", reflow("\n".join(lines)).replace("_", ""))
            data, count = inflate.unused_data, count + 1


def python_files(modules: Iterable[str], max_bytes: int = 60_000) -> Iterator[Document]:
    """Python source of the standard library ("" in `modules`) and of installed packages, without tests."""
    skip = re.compile(r"(^|/)(tests?|testing|idlelib|lib2to3|site-packages|encodings|pydoc_data|_vendor|turtledemo)/")
    for module in modules:
        spec = importlib.util.find_spec(module) if module else None
        roots = list(spec.submodule_search_locations or []) if spec else []
        if not module:
            roots = [sysconfig.get_paths()["stdlib"]]
        if not roots:
            print(f"python_code: {module} is not installed here, left out")
        for root in map(Path, roots):
            for path in sorted(root.rglob("*.py")):
                name = f"{module or 'stdlib'}/{path.relative_to(root)}"
                if not skip.search(name) and path.stat().st_size < max_bytes:
                    yield Document(name, read_text(path))
