"""Fetch and clean the pre-training corpus: `python -m examples.pretrain.corpus --work DIR`.

Everything comes from Debian packages (through apt, extracted below DIR, nothing installed) and from the running
Python. Writes DIR/text/<domain>.{train,heldout}.jsonl, DIR/text/sources.json and DIR/lexicon/. A domain whose
output exists is skipped, so an interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.pretrain import parsers
from examples.pretrain.lexicon import PAIRS, build_lexicon, translations
from examples.pretrain.parsers import Document

MIN_CHARS, MAX_CHARS = 200, 8000
HELDOUT_PERCENT = 2
LANGUAGES = ("de", "fr", "es", "it")
CODE = ("", "click", "jinja2", "werkzeug", "rich", "networkx", "markdown", "fsspec", "pydantic", "_pytest", "pygments",
        "sympy", "mpmath", "matplotlib", "setuptools", "hypothesis")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One package of a domain: how to read it, which of its files, and how many megabytes of it at most."""

    package: str
    parse: Callable[[Path, str], Iterable[Document]]
    pattern: str
    cap_mb: float


def handbook(language: str, cap_mb: float) -> Source:
    """The Debian handbook in one language."""
    return Source(
        "debian-handbook", parsers.html_pages, f"usr/share/doc/debian-handbook/html/{language}/*.html", cap_mb
    )


MAN = "usr/share/man/man[1-8]/*.gz"
DOMAINS: dict[str, list[Source]] = {
    "debian_en": [Source("Translation-en", lambda root, _: (), "en", 9)],
    "debian_de": [Source("Translation-de", lambda root, _: (), "de", 3.5), handbook("de-DE", 0.8)],
    "debian_fr": [Source("Translation-fr", lambda root, _: (), "fr", 3.5), handbook("fr-FR", 0.8)],
    "debian_es": [Source("Translation-es", lambda root, _: (), "es", 3.5), handbook("es-ES", 1.5),
                  Source("debian-reference-es", parsers.html_pages, "usr/share/debian-reference/*.html", 1),
                  Source("manpages-es", parsers.man_pages, "usr/share/man/es/man[1-8]/*.gz", 1.5)],
    "debian_it": [Source("Translation-it", lambda root, _: (), "it", 3.5), handbook("it-IT", 0.8)],
    "python_docs": [Source("python3.11-doc", parsers.rst_pages, "usr/share/doc/**/*.rst.txt", 9)],
    "python_code": [Source("", lambda root, _: parsers.python_files(CODE), "", 9)],
    "dictionary": [
        Source("dict-gcide", parsers.dictionary, "gcide", 5),
        Source("dict-wn", parsers.dictionary, "wn", 4),
    ],
    "prose": [Source("r-cran-janeaustenr", parsers.r_strings, "usr/lib/R/**/data/Rdata.rdb", 5),
              Source("fortunes-min", parsers.fortunes, "usr/share/games/fortunes/*", 1),
              Source("fortunes", parsers.fortunes, "usr/share/games/fortunes/*", 3),
              Source("anarchism", parsers.html_pages, "usr/share/doc/anarchism/html/*.html", 2.5)],
    "tech_docs": [handbook("en-US", 2),
                  Source("debian-reference-en", parsers.html_pages, "usr/share/debian-reference/*.html", 1),
                  Source("developers-reference", parsers.html_pages, "usr/share/developers-reference/*.html", 1),
                  Source("debian-policy", parsers.html_pages, "usr/share/doc/debian-policy/*.html/*.html", 1),
                  Source("debian-faq", parsers.html_pages, "usr/share/doc/debian/FAQ/*.en.html", 1),
                  Source("dict-foldoc", parsers.encyclopedia, "foldoc", 3),
                  Source("dict-jargon", parsers.encyclopedia, "jargon", 2),
                  Source("perl-doc", parsers.pod_pages, "usr/share/perl/*/pod/*.pod", 2)],
    "manpages": [Source("manpages", parsers.man_pages, MAN, 3), Source("manpages-dev", parsers.man_pages, MAN, 4),
                 Source("git-man", parsers.man_pages, MAN, 1.5), Source("coreutils", parsers.man_pages, MAN, 1)],
    "freedict": [Source(f"dict-freedict-{pair}", translations, name, 1.2) for pair, (name, _) in PAIRS.items()],
}  # fmt: skip


class Packages:
    """Debian packages and description indexes, fetched by apt below one folder; the system stays as it is."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.lists = work / "apt" / "lists"
        self.options = [f"-oDir::State::Lists={self.lists}", "-oDir::Cache::pkgcache=", "-oDir::Cache::srcpkgcache=",
                        "-oAcquire::Languages=en," + ",".join(LANGUAGES), "-qq"]  # fmt: skip

    def update(self) -> None:
        """Fetch the package lists once."""
        (self.lists / "partial").mkdir(parents=True, exist_ok=True)
        (self.work / "deb").mkdir(exist_ok=True)
        if not list(self.lists.glob("*Translation-*")):
            subprocess.run(["apt-get", *self.options, "update"], check=True, capture_output=True)

    def translation(self, language: str) -> str:
        """The raw index of package descriptions in one language."""
        paths = sorted(self.lists.glob(f"*_main_i18n_Translation-{language}*"))
        if not paths:
            raise RuntimeError("no such index in the package lists")
        biggest = max(paths, key=lambda p: p.stat().st_size)
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(biggest)]
        return subprocess.run(command, check=True, capture_output=True).stdout.decode("utf-8", errors="ignore")

    def extract(self, package: str) -> tuple[Path, str]:
        """Download and unpack a package; returns its folder and version."""
        root, deb = self.work / "root" / package, self.work / "deb"
        if not list(deb.glob(f"{package}_*.deb")):
            done = subprocess.run(
                ["apt-get", *self.options, "download", package], cwd=deb, capture_output=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"apt-get download failed: {done.stderr.decode().strip().splitlines()[-1:]}")
        archive = str(next(deb.glob(f"{package}_*.deb")))
        if not root.exists():
            part = root.with_name(root.name + ".part")
            part.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", archive, str(part)], check=True, capture_output=True)
            part.rename(root)
        version = subprocess.run(["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True)
        return root, version.stdout.decode().strip()


def pieces(text: str) -> Iterator[str]:
    """Clean a text and cut it, at blank lines where possible, into pieces of MIN_CHARS..MAX_CHARS characters."""
    text = re.sub(r"[^\S\n]+$", "", text.replace("\r", "").expandtabs(4), flags=re.MULTILINE)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\ufffd\u00ad]", "", text)
    piece = ""
    for part in re.split(r"(?<=\n)\n", re.sub(r"\n{3,}", "\n\n", text)):
        for start in range(0, max(len(part), 1), MAX_CHARS - 2):
            chunk = part[start : start + MAX_CHARS - 2]
            if len(piece) + len(chunk) + 1 > MAX_CHARS:
                yield piece.strip("\n")
                piece = ""
            piece += ("\n" if piece else "") + chunk
    yield piece.strip("\n")


def digest(text: str) -> str:
    """Hash of the normalised text: lower case, words only."""
    return hashlib.sha256(" ".join(re.findall(r"\w+", text.lower())).encode()).hexdigest()


def collect(documents: Iterable[Document], seen: set[str], cap_mb: float) -> list[tuple[bool, dict[str, str]]]:
    """(held out?, record) for new documents, in hash order up to the cap: a fair and repeatable sample."""
    found: dict[str, tuple[bool, dict[str, str]]] = {}
    for doc in documents:
        for number, text in enumerate(pieces(doc.text)):
            key = digest(text)
            if key not in seen and len(text) >= MIN_CHARS:
                seen.add(key)
                heldout = int(digest(doc.group)[:8] if doc.group else key[:8], 16) % 100 < HELDOUT_PERCENT
                found[key] = heldout, {"id": f"{doc.id}#{number}", "text": text}
    kept, size = [], 0
    for key in sorted(found, key=lambda k: k[::-1]):  # reversed, so that the order is independent of the split
        size += len(found[key][1]["text"].encode())
        if size > cap_mb * 1e6:
            break
        kept.append(found[key])
    return kept


def build_domain(name: str, packages: Packages, text_dir: Path) -> dict[str, object]:
    """Fetch, parse and write one domain; returns its entry for sources.json."""
    seen: set[str] = set()
    records: list[tuple[bool, dict[str, str]]] = []
    used = []
    for source in DOMAINS[name]:
        try:
            version = f"python {sys.version.split()[0]}"
            if source.package.startswith("Translation-"):
                documents, version = parsers.descriptions(packages.translation(source.pattern)), "index"
            else:
                root = Path()
                if source.package:
                    root, version = packages.extract(source.package)
                documents = source.parse(root, source.pattern)
            kept = collect(documents, seen, source.cap_mb)
        except (OSError, RuntimeError, subprocess.CalledProcessError, StopIteration) as error:
            print(f"{name}: {source.package} left out: {error}")
            continue
        size = sum(len(record["text"].encode()) for _, record in kept)
        package = source.package or "installed: stdlib " + " ".join(CODE).strip()
        used.append({"package": package, "version": version, "docs": len(kept), "bytes": size})
        records += kept
    entry: dict[str, object] = {"sources": used}
    if not used:
        return entry
    for split in ("train", "heldout"):
        rows = [record for heldout, record in records if heldout == (split == "heldout")]
        part = text_dir / f"{name}.{split}.part"
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.rename(text_dir / f"{name}.{split}.jsonl")
        entry[split] = {"docs": len(rows), "bytes": sum(len(row["text"].encode()) for row in rows)}
    return entry


def main() -> None:
    """Build every domain that is not there yet, then the lexicon, and print the table of sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and output")
    parser.add_argument("--only", nargs="*", choices=sorted(DOMAINS), help="build these domains only")
    args = parser.parse_args()
    work: Path = args.work.resolve()
    text_dir = work / "text"
    text_dir.mkdir(parents=True, exist_ok=True)
    packages = Packages(work)
    packages.update()
    summary_path = text_dir / "sources.json"
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    for name in args.only or DOMAINS:
        if name in summary and all((text_dir / f"{name}.{s}.jsonl").exists() for s in ("train", "heldout")):
            continue
        print(f"building {name}", flush=True)
        entry = build_domain(name, packages, text_dir)
        if not entry["sources"]:
            print(f"{name}: nothing could be read; run again to retry")
            continue
        summary[name] = entry
        summary_path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if set(DOMAINS) <= set(summary):
        build_lexicon(lambda package: packages.extract(package)[0], text_dir, work / "lexicon")
    print(f"{'domain':12} {'train docs':>10} {'train MB':>9} {'held docs':>9} {'held kB':>8}")
    for name, entry in summary.items():
        train, held = entry["train"], entry["heldout"]
        print(f"{name:12} {train['docs']:10} {train['bytes'] / 1e6:9.2f} {held['docs']:9} {held['bytes'] / 1e3:8.1f}")
    print(f"{'total':12} {'':10} {sum(e['train']['bytes'] for e in summary.values()) / 1e6:9.2f}")


if __name__ == "__main__":
    main()
