"""Build the pre-training corpus: one JSONL of real, redistributable text per domain.

    python data/build_corpus.py --output build/corpus

writes `{domain}.jsonl` and `{domain}.valid.jsonl` (one {"text": ...} per line) and
`manifest.json` (sources, versions, licences, sizes, hashes); and the held-out text of the domains
once more to where it is shipped. The text of the shipped tasks stays
out: scripture is Old Testament only, because the translation task is made of the New Testament.
"""

import argparse
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from arithmetic import worksheets
from chats import Words, chats, repetitions
from packages import (
    KING_JAMES,
    OLD_TESTAMENT,
    WORLD_ENGLISH,
    Package,
    Unpacked,
    bible_verses,
    fetch,
)

SEED = 0
MIN_DOCUMENT, MAX_DOCUMENT = 300, 6000  # bytes aimed at; a paragraph is never cut
VALID_BYTES = 80_000
CHAT_BYTES, REPETITION_BYTES = 24_000_000, 12_000_000
VALID_LONGEST_UNIT = 40_000  # bytes; so that one large file cannot be all of the held-out text

# A document together with the unit that must not be divided between training and held-out text.
Document = tuple[str, str]

MINIMAL = Package("apt", "libpython3.11-minimal", "", "PSF-2.0 and compatible")
STDLIB = Package("apt", "libpython3.11-stdlib", "", "PSF-2.0 and compatible")
METAMATH = Package("apt", "metamath-databases", "", "CC0-1.0")
WORDNET = Package("apt", "wordnet-base", "", "WordNet-3.0")
LICENCES = Package("pip", "licensedcode-data", "32.1.0", "CC-BY-4.0")
POETRY = Package("npm", "chinese-poetry", "2.0.1", "MIT (public domain poems)")


def pack_paragraphs(paragraphs: Iterable[str], separator: str) -> Iterator[str]:
    """Join consecutive paragraphs into documents of MIN_DOCUMENT to about MAX_DOCUMENT bytes."""
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        length = len(paragraph.encode())
        if size >= MIN_DOCUMENT and size + length > MAX_DOCUMENT:
            yield separator.join(held)
            held, size = [], 0
        held.append(paragraph)
        size += length
    if size >= MIN_DOCUMENT:
        yield separator.join(held)


def without_repeats(paragraphs: Iterable[str], seen: set[str], shortest: int = 80) -> Iterator[str]:
    """Drop paragraphs already in `seen` (spacing and case ignored), keeping those too short."""
    for paragraph in paragraphs:
        key = " ".join(paragraph.lower().split())
        if len(key) >= shortest and key in seen:
            continue
        seen.add(key)
        yield paragraph


def python_documents(*sources: Unpacked) -> Iterator[Document]:
    """Standard library modules, cut at blank lines; generated tables left out."""
    seen: set[str] = set()
    for source in sources:
        for path in sorted(source.folder.rglob("*.py")):
            if path.is_symlink() or {"encodings", "pydoc_data"} & set(path.parts):
                continue
            code = path.read_text(encoding="utf-8")
            # Every block keeps the blank lines after it: one in a body, two between definitions.
            blocks = re.split(r"(?<=\n\n)(?!\n)", code.expandtabs(8))
            for text in pack_paragraphs(without_repeats(blocks, seen), ""):
                yield str(path.relative_to(source.folder)), text.strip("\n")


def math_documents(metamath: Unpacked) -> Iterator[Document]:
    """Metamath's set.mm: comments, hypotheses and theorems, without the compressed proofs."""
    text = metamath.read("usr/share/metamath/databases/set.mm")
    text = re.sub(r"\$=.*?\$\.", "$.", text, flags=re.DOTALL)
    text = re.sub(r"\$d[^$]*\$\.", "", text)
    # Credits follow nearly every theorem: boilerplate that would be an easy share of the domain.
    text = re.sub(
        r"\s*\((?:Contributed|Revised|Proof\s+shortened|Proof\s+revised)[^()]*\)", "", text
    )
    text = re.sub(r"\s*\((?:New usage|Proof modification)\s+is\s+discouraged\.\)", "", text)
    text = re.sub(r"[#*=\-.]{20,}|\$\{|\$\}", "", text)
    lines = "\n".join(line.strip() for line in text.split("\n"))
    # The longest blocks are change logs and tables of HTML and LaTeX symbols, not mathematics.
    theorems = [block for block in re.split(r"\n\s*\n", lines) if len(block) < MAX_DOCUMENT]
    for number, page in enumerate(pack_paragraphs(without_repeats(theorems, set()), "\n\n")):
        yield str(number), page.strip()


def scripture_documents(*bibles: Unpacked) -> Iterator[Document]:
    """Old Testament chapters, one verse per line; all translations of a chapter are one unit."""
    for bible in bibles:
        chapters = itertools.groupby(bible_verses(bible), key=lambda verse: verse[:2])
        for (book, chapter), verses in chapters:
            if book in OLD_TESTAMENT:
                lines = [text for *_, text in verses]
                for text in pack_paragraphs(lines, "\n"):
                    yield f"{book}:{chapter}", text


def dictionary_documents(wordnet: Unpacked) -> Iterator[Document]:
    """WordNet's words with their definitions and examples, in the order of its taxonomy."""
    classes = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for suffix, word_class in classes.items():
        entries = []
        for line in wordnet.read(f"usr/share/wordnet/data.{suffix}").splitlines():
            if line.startswith("  "):  # the licence at the top of the file
                continue
            fields, gloss = line.split(" | ")
            words = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
            names = ", ".join(re.sub(r"\(.*\)", "", word).replace("_", " ") for word in words)
            entries.append(f"{names} ({word_class}): {gloss.strip()}")
        for number, text in enumerate(pack_paragraphs(entries, "\n")):
            yield f"{suffix}{number}", text


def licence_documents(licences: Unpacked) -> Iterator[Document]:
    """Full licence texts; the notices ("rules") of the package are left for tasks."""
    seen: set[str] = set()
    for path in sorted((licences.folder / "licensedcode/data/licenses").glob("*.LICENSE")):
        # The file starts with YAML metadata between two lines of dashes.
        metadata, _, body = path.read_text(encoding="utf-8").partition("\n---\n")
        if "\nlanguage: " in metadata:  # a translation; English carries no such line
            continue
        paragraphs = re.split(r"\n\s*\n", body.strip())
        for text in pack_paragraphs(without_repeats(paragraphs, seen), "\n\n"):
            yield path.name, text


def poetry_documents(poetry: Unpacked) -> Iterator[Document]:
    """Complete Tang poems in traditional characters: title, author, lines; a few per document."""
    folder = poetry.folder / "package/dist/quantangshi"
    paths = sorted(folder.glob("poet.tang.*.json"), key=lambda path: int(path.name.split(".")[2]))
    poems = []
    for path in paths:
        for poem in json.loads(path.read_text(encoding="utf-8")):
            lines = "\n".join(poem["paragraphs"])
            # Braces and boxes stand for characters that the edition could not encode.
            if lines and not re.search(r"[{}□〖〗()（）\[\]]", lines + poem["title"]):
                poems.append(f"{poem['title']}\n{poem['author']}\n{lines}")
    for number, text in enumerate(pack_paragraphs(without_repeats(poems, set(), 0), "\n\n")):
        yield str(number), text


def arithmetic_documents() -> Iterator[Document]:
    """Generated worksheets, of which the cap takes what it needs."""
    for number, text in enumerate(worksheets(SEED, count=4_000)):
        yield str(number), text


@dataclass(frozen=True)
class Domain:
    """How a domain is read, from which packages, and the bytes at which it is cut off."""

    documents: Callable[..., Iterator[Document]]
    packages: tuple[Package, ...]
    limit: int


DOMAINS = {
    "python": Domain(python_documents, (MINIMAL, STDLIB), 7_500_000),
    "math": Domain(math_documents, (METAMATH,), 6_500_000),
    "scripture": Domain(scripture_documents, (WORLD_ENGLISH, KING_JAMES), 7_000_000),
    "dictionary": Domain(dictionary_documents, (WORDNET,), 7_000_000),
    "licences": Domain(licence_documents, (LICENCES,), 6_000_000),
    "poetry": Domain(poetry_documents, (POETRY,), 4_500_000),
    "arithmetic": Domain(arithmetic_documents, (), 2_200_000),
}


def split(documents: Iterable[Document], limit: int) -> tuple[list[str], list[str]]:
    """Shuffle the units with a fixed seed; return (held-out texts, training texts).

    Held-out units come first, up to VALID_BYTES; training takes the others until `limit` bytes.
    """
    units: dict[str, list[str]] = {}
    for unit, text in documents:
        units.setdefault(unit, []).append(text)
    order = sorted(units)
    random.Random(SEED).shuffle(order)
    valid: list[str] = []
    train: list[str] = []
    valid_bytes = train_bytes = 0
    for unit in order:
        size = sum(len(text.encode()) for text in units[unit])
        if valid_bytes < VALID_BYTES and size <= VALID_LONGEST_UNIT:
            valid += units[unit]
            valid_bytes += size
        elif train_bytes < limit:
            train += units[unit]
            train_bytes += size
    return valid, train


def until(size: int, texts: Iterable[str]) -> list[str]:
    """Take texts until they make `size` bytes."""
    taken: list[str] = []
    for text in texts:
        if size <= 0:
            break
        taken.append(text)
        size -= len(text.encode())
    return taken


def write_domain(output: Path, name: str, valid: list[str], train: list[str]) -> dict[str, object]:
    """Write a domain's texts as JSONL and return its files' lines of the manifest."""
    files: dict[str, object] = {}
    for file, texts in {f"{name}.jsonl": train, f"{name}.valid.jsonl": valid}.items():
        content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (output / file).write_text(content, encoding="utf-8")
        files[file] = {
            "documents": len(texts),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
        }
    print(f"{name}: {files}")
    return files


def build(output: Path, cache: Path) -> None:
    """Write every domain's two files and the manifest into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, object] = {}
    valid: dict[str, list[str]] = {}
    train: dict[str, list[str]] = {}
    for name, domain in DOMAINS.items():
        packages = [fetch(package, cache) for package in domain.packages]
        valid[name], train[name] = split(domain.documents(*packages), domain.limit)
        sources = [
            {"package": p.package.name, "version": p.version, "licence": p.package.licence}
            for p in packages
        ]
        files = write_domain(output, name, valid[name], train[name])
        manifest[name] = {"sources": sources, "files": files}
    # Held-out chats quote held-out text, and only that; words are the same in both.
    words = Words.of(train)
    files = write_domain(
        output,
        "chats",
        until(VALID_BYTES, chats(SEED + 1, words, valid)),
        until(CHAT_BYTES, chats(SEED, words, train)),
    )
    manifest["chats"] = {"sources": ["dictionary", "python", "scripture"], "files": files}
    files = write_domain(
        output,
        "repetition",
        until(VALID_BYTES, repetitions(SEED + 1, words)),
        until(REPETITION_BYTES, repetitions(SEED, words)),
    )
    manifest["repetition"] = {"sources": ["dictionary", "scripture"], "files": files}
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build the pre-training corpus.")
    parser.add_argument("--output", type=Path, default=Path("build/corpus"))
    parser.add_argument("--held-out", type=Path, default=Path("data/held_out"))
    parser.add_argument("--cache", type=Path, default=Path("build/packages"))
    arguments = parser.parse_args()
    build(arguments.output, arguments.cache)
    arguments.held_out.mkdir(parents=True, exist_ok=True)
    for name in (*DOMAINS, "chats"):
        text = (arguments.output / f"{name}.valid.jsonl").read_text(encoding="utf-8")
        (arguments.held_out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
