"""A file as the text in it: compression and encoding are told by its first bytes, not by its name.

Lines end at a line feed alone: U+2028, U+2029 and U+0085 are characters of a text like any other.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

ENDINGS = (".gz", ".zst", ".zstd", ".xz", ".bz2")  # behind the ending that tells the kind
MARKS = {  # byte order marks, the longest first: UTF-32 begins as UTF-16 does
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError)  # what reading a broken file raises
SAMPLE = 16 << 20  # bytes of text that tell how much is in a compressed file
CHUNK = 1 << 20


def kind(file: Path) -> str:
    """The ending that tells the kind of a file, in small letters, whatever it is compressed with: `.jsonl`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in ENDINGS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def text_of(file: Path, *, newline: str = "\n") -> Generator[TextIO]:
    """Open a text: decompressed and decoded, its byte order mark left out.

    A byte that is not UTF-8 becomes half of a surrogate pair, so that its line can be named.

    Args:
        file: Of text, compressed or not.
        newline: As `open` has it.

    Raises:
        OSError: It cannot be opened.
    """
    with file.open("rb") as packed:
        start = _decompressed(packed).read(4)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    with (
        file.open("rb") as packed,
        io.TextIOWrapper(_decompressed(packed), encoding=encoding, errors=errors, newline=newline) as text,
    ):
        yield text


def text_bytes(file: Path) -> int:
    """Bytes of a file's text. Of a large compressed file they are estimated from the first 16 MiB of it."""
    size = file.stat().st_size
    with file.open("rb") as packed:
        opened = _decompressed(packed)
        if opened is packed:
            return size
        text = 0
        try:
            while text < SAMPLE and (read := opened.read(CHUNK)):
                text += len(read)
            return round(size * text / packed.tell()) if text >= SAMPLE else text
        except UNREADABLE:
            return size


def _decompressed(packed: BinaryIO) -> BinaryIO:
    """What is in a file that stands at its start."""
    start = packed.read(6)
    packed.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.open(packed))
    if start.startswith(b"\xfd7zXZ\x00"):
        return cast(BinaryIO, lzma.open(packed))
    if start.startswith(b"BZh"):
        return cast(BinaryIO, bz2.open(packed))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        pyarrow: Any = importlib.import_module("pyarrow")  # the standard library has Zstandard from 3.14 on
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream))
    return packed
