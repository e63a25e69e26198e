"""Make the demo model's corpus: English prose from freely licensed Debian packages.

    python corpus.py --work FOLDER

downloads the packages of `PACKAGES` with `apt-get download` (`mandoc` and `bible-kjv` are needed
beside), takes headings and paragraphs out of their HTML, text and manual pages (no listings, no
tables, no other languages), drops paragraphs that it has seen, trains a byte-level BPE tokenizer of
4,096 entries and writes

    FOLDER/tokenizer.json
    FOLDER/train.bin, FOLDER/held_out.bin     uint16 token ids, documents end with <|end|>
    FOLDER/corpus.json                        packages, versions, characters, tokens

Every fiftieth document is held out. A section becomes a document twice: as plain text, and as an
exchange of the chat template, in which the heading is what the user asks about.
"""

import argparse
import dataclasses
import gzip
import hashlib
import html.parser
import json
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGES = {
    "anarchism": "GPL-2",
    "apache2-doc": "Apache-2.0",
    "bible-kjv-text": "public domain",
    "debian-faq": "GPL-2+",
    "debian-handbook": "GPL-2+ or CC-BY-SA-3.0+",
    "debian-history": "GPL-2+",
    "debian-policy": "GPL-2+",
    "debian-reference-en": "GPL-2+",
    "developers-reference": "GPL-2",
    "git-doc": "GPL-2",
    "gnome-user-docs": "CC-BY-SA-3.0+",
    "installation-guide-amd64": "GPL-2+",
    "jargon-text": "public domain",
    "kicad-doc-en": "GPL-3+ or CC-BY-3.0+",
    "libreoffice-help-en-us": "MPL-2.0",
    "linux-doc-6.1": "GPL-2",
    "manpages": "free, per page (GPL-2+, BSD, MIT-like)",
    "manpages-dev": "free, per page (GPL-2+, BSD, MIT-like)",
    "perl-doc": "Artistic or GPL-1+",
    "postgresql-doc-15": "PostgreSQL",
    "python-django-doc": "BSD-3-Clause",
    "python-sqlalchemy-doc": "MIT",
    "python3.11-doc": "PSF-2.0",
    "rust-doc": "MIT or Apache-2.0",
    "sqlite3-doc": "public domain",
}
SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
VOCABULARY = 4096
HELD_OUT_EVERY = 50
ASKING = [
    "{}",
    "{}?",
    "Tell me about {}.",
    "Explain {}.",
    "What is {}?",
    "What should I know about {}?",
    "Write about {}.",
    "How does {} work?",
]
_LANGUAGE = re.compile(r"\.html\.(\w\w)(?:-\w+)?$|/([a-z]{2}|C)(?:-\w\w|_\w\w)?/")
_SPACE = re.compile(r"\s+")


@dataclasses.dataclass
class Section:
    """A heading and the paragraphs below it."""

    heading: str
    paragraphs: list[str]


class SectionParser(html.parser.HTMLParser):
    """Collects sections from HTML; listings, tables, scripts and navigation are left out."""

    _HEADINGS = frozenset({"h1", "h2", "h3", "h4"})
    _TEXT = frozenset({"p", "dd", "li"})
    _SKIPPED = frozenset({"pre", "script", "style", "nav", "table", "head", "footer", "svg"})

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[Section] = [Section("", [])]
        self._skip = 0
        self._kind: str | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._SKIPPED:
            self._skip += 1
        elif tag == "div":
            # Publican (debian-handbook) writes its paragraphs as <div class="para">.
            self._finish()
            if ("class", "para") in attrs:
                self._kind = "p"
        elif tag in self._HEADINGS or tag in self._TEXT:
            self._finish()
            self._kind = tag

    def handle_endtag(self, tag: str) -> None:
        if tag in self._SKIPPED:
            self._skip = max(0, self._skip - 1)
        elif tag in self._HEADINGS or tag in self._TEXT or tag == "div":
            self._finish()

    def handle_data(self, data: str) -> None:
        if self._kind is not None and not self._skip:
            self._text.append(data)

    def _finish(self) -> None:
        text = _SPACE.sub(" ", "".join(self._text)).replace("¶", "").strip()
        kind, self._kind, self._text = self._kind, None, []
        if not text or kind is None:
            return
        if kind in self._HEADINGS:
            self.sections.append(Section(re.sub(r"^[\dA-Z]+(\.\d+)*\.?\s+", "", text), []))
        else:
            self.sections[-1].paragraphs.append(text)


def text_sections(text: str) -> Iterator[Section]:
    """Sections of a plain text file: a short line that stands alone is a heading."""
    section = Section("", [])
    for part in re.split(r"\n\s*\n", text):
        flat = _SPACE.sub(" ", part).strip()
        if 3 < len(flat) < 60 and "\n" not in part.strip() and flat[-1] not in ".:;,":
            yield section
            section = Section(flat, [])
        else:
            section.paragraphs.append(flat)
    yield section


def kjv_sections(folder: Path) -> Iterator[Section]:
    """Chapters of the King James Bible, printed by the `bible` program (package bible-kjv)."""
    printed = subprocess.run(
        ["bible", "-p", str(folder / "usr/lib"), "-f", "Gen1:1-Rev22:21"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    chapters: dict[str, list[str]] = {}
    for chapter, verse in re.findall(r"^(\w+):\d+ (.+)$", printed, re.M):
        chapters.setdefault(chapter, []).append(verse.strip())
    for heading, verses in chapters.items():
        book, number = re.fullmatch(r"(\d?\D+)(\d+)", heading).groups()
        yield Section(f"{book} chapter {number}", [" ".join(verses)])


def man_sections(source: Path) -> Iterator[Section]:
    """Sections of a manual page, by way of `mandoc -T html`."""
    page = subprocess.run(
        ["mandoc", "-T", "html", str(source)], capture_output=True, text=True, check=False
    )
    parser = SectionParser()
    parser.feed(page.stdout)
    name = source.name.split(".")[0]
    for section in parser.sections:
        section.heading = f"{name}: {section.heading.lower()}"
        yield section


def is_prose(paragraph: str) -> bool:
    """Long enough, ASCII, and made of words rather than of symbols."""
    if not 60 <= len(paragraph) <= 6000 or not paragraph.isascii():
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return letters >= 0.88 * len(paragraph) and paragraph[-1] in ".!?:\"')"


def read_package(folder: Path, package: str) -> Iterator[Section]:
    """All English sections of an unpacked package."""
    if package == "bible-kjv-text":
        yield from kjv_sections(folder)
        return
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        relative = path.relative_to(folder).as_posix()
        language = _LANGUAGE.search(relative)
        if language and next(filter(None, language.groups())) not in {"en", "C"}:
            continue
        name = path.name.removesuffix(".gz")
        if re.search(r"/man[1-9]/", relative):
            yield from man_sections(path)
        elif re.search(r"\.x?html?(\.en)?$|\.page$", name):
            parser = SectionParser()
            parser.feed(read_text(path))
            yield from parser.sections
        elif re.search(r"/(changelog|copyright)", relative):
            continue
        elif name.endswith((".txt", ".rst", ".pod", ".adoc")):
            yield from text_sections(read_text(path))


def read_text(path: Path) -> str:
    """The file's text, unpacked where it is gzipped."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "ignore")


def fetch(package: str, work: Path) -> tuple[Path, str]:
    """Download and unpack a package; its folder and version."""
    debs, folder = work / "debs", work / "unpacked" / package
    for made in (debs, folder.parent):
        made.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(debs.glob(f"{package}_*.deb"))):
        subprocess.run(["apt-get", "download", "-q", package], cwd=debs, check=True)
        found = sorted(debs.glob(f"{package}_*.deb"))
    if not folder.exists():
        subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(folder)], check=True)
    return folder, found[-1].name.split("_")[1]


def collect(work: Path) -> tuple[list[Section], dict[str, dict[str, object]]]:
    """All sections with at least one paragraph never seen before, and what each package gave."""
    seen: set[bytes] = set()
    sections: list[Section] = []
    report: dict[str, dict[str, object]] = {}
    for package, licence in PACKAGES.items():
        folder, version = fetch(package, work)
        characters = 0
        for section in read_package(folder, package):
            fresh = []
            for paragraph in filter(is_prose, section.paragraphs):
                key = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
                if key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            if fresh:
                characters += sum(map(len, fresh))
                sections.append(Section(section.heading[:100], fresh))
        report[package] = {"version": version, "licence": licence, "characters": characters}
        print(f"{package:28} {version:24} {characters:>12,}", flush=True)
    return sections, report


def documents(section: Section, draw: random.Random) -> Iterator[str]:
    """The texts a section is trained as."""
    body = "\n\n".join(section.paragraphs)
    yield f"{section.heading}\n\n{body}<|end|>" if section.heading else f"{body}<|end|>"
    if section.heading:
        asked = draw.choice(ASKING).format(section.heading)
        yield f"<|user|>{asked}<|end|><|assistant|>{body}<|end|>"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, none is changed by a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    """Build everything into --work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work.resolve()
    sections, report = collect(work)
    draw = random.Random(0)
    draw.shuffle(sections)
    sample = ["\n\n".join(s.paragraphs) for s in sections[:: max(1, len(sections) // 60_000)]]
    tokenizer = train_tokenizer(sample)
    tokenizer.save(str(work / "tokenizer.json"))
    counts = {}
    for name, part in (
        ("held_out", sections[::HELD_OUT_EVERY]),
        ("train", [s for i, s in enumerate(sections) if i % HELD_OUT_EVERY]),
    ):
        texts = [text for section in part for text in documents(section, draw)]
        draw.shuffle(texts)
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        flat = np.fromiter((i for one in ids for i in one), dtype=np.uint16)
        flat.tofile(work / f"{name}.bin")
        counts[name] = len(flat)
    summary = {"packages": report, "sections": len(sections), "tokens": counts}
    (work / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(counts)


if __name__ == "__main__":
    main()
