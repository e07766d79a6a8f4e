# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
"""Packages through their ordinary clients, and the texts in them."""

import gzip
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

from .sources import Source

MIN_CHARACTERS = 1000


def fetch(source: Source, folder: Path) -> Path:
    """The package's archive in ``folder``; one that is there is taken as it is.

    Raises:
        RuntimeError: the client is missing or has no such package.
    """
    target = folder / source.requirement.replace("==", "-")
    suffix = {"apt": "*.deb", "pip": "*.whl"}[source.client]
    if not list(target.glob(suffix)):
        target.mkdir(parents=True, exist_ok=True)
        if source.client == "apt":
            command = ["apt-get", "download", "-q", source.requirement]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", source.requirement]
        if shutil.which(command[0]) is None:
            hint = f"{command[0]} is missing; --skip {source.name} leaves it out"
            raise RuntimeError(hint)
        result = subprocess.run(command, cwd=target, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"{source.client} could not fetch {source.requirement} (--skip "
                f"{source.name} leaves it out):\n{result.stderr.strip()}"
            )
    return next(target.glob(suffix))


def matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def documents(source: Source, archive: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of the files that are read, by path, so that a package's files,
    and a book's chapters, stand together."""
    for path, data in _members(source, archive):
        if path.endswith(".gz"):
            path, data = path[:-3], gzip.decompress(data)
        if path.endswith(".rdb"):
            yield from _novels(path, data)
            continue
        text = data.decode("utf-8", errors="ignore")
        if path.endswith(".html"):
            text = html_text(text)
        text = clean(text)
        if usable(text):
            yield path, text


def _members(source: Source, archive: Path) -> Iterator[tuple[str, bytes]]:
    wanted = lambda path: matches(path, source.files)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path in filter(wanted, sorted(wheel.namelist())):
                yield path, wheel.read(path)
        return
    with TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        for file in sorted(Path(folder).rglob("*")):
            path = str(file.relative_to(folder))
            if wanted(path) and file.is_file() and not file.is_symlink():
                yield path, file.read_bytes()


def clean(text: str) -> str:
    text = re.sub(r"[ \t\r\f]+\n", "\n", text.replace("\t", "    "))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip() + "\n"


def usable(text: str) -> bool:
    """Long enough, and text that people wrote rather than data."""
    return (
        len(text) >= MIN_CHARACTERS
        and sum(map(str.isdigit, text)) < 0.15 * len(text)
        and sum(char > "\x7f" for char in text) < 0.05 * len(text)
        and len(text) < 150 * (1 + text.count("\n"))
    )


def html_text(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    return re.sub(r"\s*\n\s*\n", "\n\n", "".join(parser.parts))


class _Text(HTMLParser):
    """What a reader sees of a page; preformatted text keeps its lines."""

    HIDDEN = {"script", "style", "nav", "head", "header", "footer", "svg"}
    BLOCKS = {"p", "div", "li", "tr", "dt", "dd", "h1", "h2", "h3", "h4", "pre", "br"}

    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.preformatted = 0

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in self.HIDDEN
        self.preformatted += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.hidden = max(0, self.hidden - (tag in self.HIDDEN))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            text = data if self.preformatted else re.sub(r"\s+", " ", data)
            self.parts.append(text)


def _novels(path: str, data: bytes) -> Iterator[tuple[str, str]]:
    """Vectors of lines in R's lazy-load format: length, zlib, R's serialisation, where
    a string is four bytes of flags, its length and its bytes."""
    while data:
        unpacked = zlib.decompressobj()
        raw = unpacked.decompress(data[4:])
        data = unpacked.unused_data
        lines = []
        at = raw.find(b"\x00\x04\x00\x09")
        while raw[at : at + 4] in (b"\x00\x04\x00\x09", b"\x00\x00\x80\x09"):
            size = int.from_bytes(raw[at + 4 : at + 8])
            lines.append(raw[at + 8 : at + 8 + size].decode("utf-8", errors="ignore"))
            at += 8 + size
        yield f"{path}/{lines[0].title()}", clean("\n".join(lines))
