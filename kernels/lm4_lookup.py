"""Triton: the eight LM4 codes of a 32-bit word, looked up in registers.

A rank has three bits, so a table of eight bytes is two registers, and PTX's ``prmt`` ("permute
bytes") looks four ranks up at once. Its selectors are nibbles, as the codes are: a word whose signs
are masked out is two of them.

Code i of a word stands in bits 4 i ... 4 i + 3, its sign in the highest of them. Even codes are
those of the bytes' low nibbles.
"""

import torch
import triton
import triton.language as tl

from .formats.lm4 import CODES, LEVELS, UNITS

UNITS_PER_SCALE = tl.constexpr(UNITS)

SIGNS = tl.constexpr(0x80808080 - 2**32)
"""The highest bit of each byte, as int32."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""By an interpreter that knows no PTX."""

Table = tuple[int, int]
"""A byte for each rank, the low end first, as two int32."""


def _table(numbers: tuple[float, ...], dtype: torch.dtype, byte: int = 0) -> Table:
    """Return one byte of each of eight numbers."""
    bits = torch.tensor(numbers, dtype=torch.float64).to(dtype).view(torch.uint8)
    first, last = bits.view(8, -1)[:, byte].contiguous().view(torch.int32).tolist()
    return first, last


def _halves(dtype: torch.dtype) -> tl.constexpr:
    """Return the tables of low and high bytes of 16-bit floats, one behind the other."""
    return tl.constexpr((*_table(LEVELS, dtype), *_table(LEVELS, dtype, 1)))


def _bytes(table: Table) -> tl.constexpr:
    """Return a table, and PTX that looks a word's even codes up in it, and its odd ones."""
    return tl.constexpr((*table, *(_look_up_ptx(table, which) for which in ("0x6420", "0x7531"))))


def _look_up_ptx(table: Table, which: str) -> str:
    """Write PTX that makes four bytes of a word: which of those of all codes in their order.

    It takes the word alone, and stands twice. So Triton sees elementwise work on what was loaded,
    and brings words into the layout of a product rather than what becomes of them; what the two
    share, ptxas does once.
    """
    return (
        f"{{ .reg .b32 r, s, x, y, a, b; mov.b32 x, {table[0]}; mov.b32 y, {table[1]}; "
        "and.b32 r, $1, 0x77777777; shr.u32 s, r, 16; "
        f"prmt.b32 a, x, y, r; prmt.b32 b, x, y, s; prmt.b32 $0, a, b, {which}; }}"
    )


INT8 = _bytes(_table(CODES, torch.int8))
FP8 = _bytes(_table(tuple(code * 2.0**-9 for code in CODES), torch.float8_e4m3fn))
"""Times 2^-9, as unpack_w4/reference.py has it."""
BF16, FP16 = _halves(torch.bfloat16), _halves(torch.float16)

PTX_KEPT = tl.constexpr(
    "{ .reg .b32 t; mov.u32 t, %laneid; add.u32 t, t, $2; shr.u32 t, t, 31; xor.b32 $0, $1, t; }"
)


@triton.jit
def permuted(a, b, selectors):
    """Return four of the bytes 0 ... 3 of a and 4 ... 7 of b, named by four nibbles below 8."""
    if INTERPRETED:
        out = (a ^ a) | (selectors ^ selectors)
        for i in tl.static_range(4):
            name = (selectors >> (4 * i)) & 7
            byte = (tl.where(name < 4, a, b) >> (8 * (name & 3))) & 0xFF
            out |= byte << (8 * i)
        return out
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selectors], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _looked_up(words, TABLE: tl.constexpr, ODD: tl.constexpr):
    """Look up the magnitudes of even codes, or of odd ones: four bytes."""
    if INTERPRETED:
        ranks = words & 0x77777777
        head = permuted(TABLE[0], TABLE[1], ranks)
        tail = permuted(TABLE[0], TABLE[1], ranks >> 16)
        return permuted(head, tail, 0x7531 if ODD else 0x6420)
    else:
        PTX: tl.constexpr = TABLE[3] if ODD else TABLE[2]
        return tl.inline_asm_elementwise(PTX, "=r,r", [words], tl.int32, is_pure=True, pack=1)


@triton.jit
def lm4_bytes(words, IN_FP8: tl.constexpr):
    """Decode a word's even codes and its odd ones, four bytes each: INT8, or FP8 times 2^-9."""
    words = words.to(tl.int32, bitcast=True)
    TABLE: tl.constexpr = FP8 if IN_FP8 else INT8
    even, odd = _looked_up(words, TABLE, False), _looked_up(words, TABLE, True)
    if IN_FP8:
        return even | ((words << 4) & SIGNS), odd | (words & SIGNS)
    even_sign, odd_sign = (words >> 3) & 0x01010101, (words >> 7) & 0x01010101
    even = (even ^ ((even_sign << 8) - even_sign)) + even_sign
    return even, (odd ^ ((odd_sign << 8) - odd_sign)) + odd_sign


@triton.jit
def _kept(word: tl.constexpr, positive):
    """Return a word of a table in a register of its own.

    ptxas would bring a constant in anew for every look-up, a tenth of a loop's instructions. So it
    is told of a number that is 0 if ``positive`` is, which it can't know of an argument.
    """
    if INTERPRETED:
        return word
    else:
        return tl.inline_asm_elementwise(
            PTX_KEPT, "=r,r,r", [word, positive], tl.int32, is_pure=True, pack=1
        )


@triton.jit
def lm4_tables(positive, IN_FP16: tl.constexpr):
    """Return the tables of :func:`lm4_planes` for bf16 or ``IN_FP16``, to be made before a loop;
    ``positive`` is any argument of the kernel that is."""
    T: tl.constexpr = FP16 if IN_FP16 else BF16
    return (
        _kept(T[0], positive),
        _kept(T[1], positive),
        _kept(T[2], positive),
        _kept(T[3], positive),
    )


@triton.jit
def lm4_planes(words, tables):
    """Look the levels of a word (int32) up as 16-bit floats: low and high bytes of codes 0 ... 3,
    and those of codes 4 ... 7."""
    ranks = words & 0x77777777
    low, low_tail = (
        permuted(tables[0], tables[1], ranks),
        permuted(tables[0], tables[1], ranks >> 16),
    )
    high, high_tail = (
        permuted(tables[2], tables[3], ranks),
        permuted(tables[2], tables[3], ranks >> 16),
    )
    # A byte's highest bit is an odd code's sign; after a shift it is an even one's.
    high |= permuted(words << 4, words, 0x5140) & SIGNS
    high_tail |= permuted(words << 4, words, 0x7362) & SIGNS
    return low, high, low_tail, high_tail


@triton.jit
def lm4_pair(low, high, SECOND: tl.constexpr):
    """Join bytes of :func:`lm4_planes` to two 16-bit floats: the first two codes, or the SECOND."""
    return permuted(low, high, 0x7362 if SECOND else 0x5140)
