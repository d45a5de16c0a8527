"""Which codes a packed layer uses, read from its file piece by piece. Standard library only."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from recipes.models.weights import Tensor

CHUNK = 1 << 16  # bytes, times the bits of a code: whole codes


def codes_used(codes: Tensor, bits: int, *, inputs: int, levels: int, signed: bool = False) -> frozenset[int]:
    """The codes that a tensor holds, read until there can be no more.

    Args:
        codes: Of GPTQ or AWQ (`qweight`), compressed-tensors (`weight_packed`) or bitsandbytes (`weight`).
        bits: Of a code, 2 to 8.
        inputs: Of the layer.
        levels: How many codes there are.
        signed: Codes of 8 bits are -128 to 127.
    """
    used: set[int] = set()
    for stream in _streams(codes, bits, inputs):
        used |= _distinct(stream, bits)
        if len(used) == levels:
            break
    return frozenset(code - 256 if signed and code > 127 else code for code in used)


def _streams(codes: Tensor, bits: int, inputs: int) -> Iterator[bytes]:
    """The codes, in pieces of whole bytes in which they lie one after the other, low bits first.

    Codes of 2, 4 and 8 bits never lie in two words, so that the order of the words does not matter.
    """
    row = codes.n_bytes // codes.shape[0]
    whole = inputs // 8 * bits  # bytes; eight codes at a time
    with codes.file.open("rb") as file:
        file.seek(codes.start)
        if codes.name.endswith(".qweight") and bits == 3:
            for _ in range(codes.shape[0] // bits):  # packed along the inputs, which go down: three words of an output
                yield _columns(file.read(bits * row), bits)
        elif codes.name.endswith(".weight_packed") and row != whole:
            for _ in range(codes.shape[0]):  # a row ends with padding
                yield file.read(row)[:whole]
        else:
            for start in range(0, codes.n_bytes, CHUNK * bits):
                yield file.read(min(CHUNK * bits, codes.n_bytes - start))


def _columns(rows: bytes, height: int) -> bytes:
    """Rows of 32-bit words, read column by column."""
    words = array("I", rows)
    turned, width = array("I", bytes(len(rows))), len(words) // height
    for number in range(height):
        turned[number::height] = words[number * width : (number + 1) * width]
    return turned.tobytes()


def _distinct(stream: bytes, bits: int) -> set[int]:
    """Codes in a stream of bits, low bits first.

    Eight codes fill `bits` bytes. As one large integer the stream is shifted by each of eight places, and masked so
    that one byte of each `bits` keeps a code.
    """
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        return {byte >> place & mask for byte in _bytes_used(stream) for place in range(0, 8, bits)}
    periods = len(stream) // bits
    number = int.from_bytes(stream[: periods * bits], "little")
    masks = int.from_bytes((bytes([mask]) + bytes(bits - 1)) * periods, "little")
    places = ((number >> place * bits & masks).to_bytes(periods * bits, "little")[::bits] for place in range(8))
    return set[int]().union(*map(_bytes_used, places))


def _bytes_used(data: bytes) -> set[int]:
    """The values of its bytes: those of the first 4 KiB are taken out of the rest, and so on."""
    used: set[int] = set()
    while data:
        used.update(data[:4096])
        data = data.translate(None, bytes(used))
    return used
