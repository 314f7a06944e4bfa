"""Grids: the finite sets of values that a stored weight may take.

A grid says that a weight in row i and column j is

    w[i, j] = scale[i, g] * levels[code[i, j]] + zero[i, g],      g = j // group

where ``zero`` is absent, stored as it is, or stored as a multiple of the scale (the integer zero
point of affine quantization, Jacob et al. 2018, eq. 1). A scale or zero is either one stored number
per group, or itself an integer times a coarser number (the double quantization of QLoRA and of
llama.cpp's K-types). A grid is a description only: how a file packs it belongs to ``formats``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import NormalDist

import torch


@dataclass(frozen=True)
class Stored:
    """How one number per group (a scale or a zero) is stored.

    ``bits == 0``: one plain number of ``dtype`` per group. Otherwise an integer between ``low`` and
    ``low + 2**bits - 1`` per group, times one plain number of ``dtype`` for every ``over`` groups.
    ``relative``: (zeros only) the stored number is multiplied by the scale of its group.
    """

    dtype: torch.dtype = torch.float16
    bits: int = 0
    low: int = 0
    over: int = 0
    relative: bool = False

    def bits_per_group(self) -> float:
        """Bits that one group spends on this number."""
        plain = self.dtype.itemsize * 8
        return float(plain) if self.bits == 0 else self.bits + plain / self.over


@dataclass(frozen=True)
class Grid:
    """Levels (whole numbers, ascending, one per code), how many columns share a scale (0: the whole
    row), and how scales and zeros are stored."""

    name: str
    levels: tuple[float, ...]
    group: int
    scale: Stored = Stored()
    zero: Stored | None = None

    def __post_init__(self) -> None:
        if any(level != int(level) for level in self.levels) or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"{self.name}: levels must be ascending whole numbers")

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def block(self) -> int:
        """Columns that must be stored together: the group, or the groups under one coarse scale."""
        return self.group * max(self.scale.over, 1)

    def bits_per_weight(self, columns: int) -> float:
        """Bits per weight, scales and zeros included, in rows of ``columns`` weights."""
        per_group = self.scale.bits_per_group()
        if self.zero is not None:
            per_group += self.zero.bits_per_group()
        return self.code_bits + per_group / (self.group or columns)


    def check(self, site: str, columns: int) -> None:
        """Raise ValueError, with site, value and remedy, unless rows of ``columns`` divide into blocks."""
        if self.block and columns % self.block:
            fitting = [n for n in (256, 128, 64, 32, 16) if columns % n == 0]
            remedy = f"use a grid of block {fitting[0]}" if fitting else "use one scale per row"
            raise ValueError(f"{site}: {columns} columns not divisible by {self.name}'s block "
                             f"{self.block}; {remedy}")

    @property
    def uniform(self) -> bool:
        """Whether neighbouring levels are one apart, so that rounding finds the nearest one."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1


def integer_grid(bits: int, group: int, *, symmetric: bool = True,
                 dtype: torch.dtype = torch.float16) -> Grid:
    """Signed integers of 2 to 8 bits, with an integer zero point unless ``symmetric``.

    >>> integer_grid(4, 128).bits_per_weight(1024)
    4.125
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie between 2 and 8, got {bits}")
    half = 1 << (bits - 1)
    zero = None if symmetric else Stored(dtype=torch.int8, relative=True)
    name = f"int{bits}{'' if symmetric else 'z'}g{group or 'row'}"
    return Grid(name, tuple(float(v) for v in range(-half, half)), group, Stored(dtype=dtype), zero)


def nf4_grid(group: int, *, over: int = 0, dtype: torch.dtype = torch.float16) -> Grid:
    """NormalFloat4: quantiles of the normal distribution, one level at zero (Dettmers et al. 2023, "QLoRA",
    section 3 and appendix E).

    over: groups that share one coarse scale, of which theirs are 8-bit steps (double quantization; 0: plain
    scales). Levels are whole numbers here: the reals times 2^15 - 1, off by less than scales are rounded by.
    """
    normal, outermost = NormalDist(), 1 - (1 / 32 + 1 / 30) / 2  # the mean of 1 - 1/32 and 1 - 1/30
    reals = [normal.inv_cdf(0.5 + (outermost - 0.5) * k / 8) for k in range(9)]
    reals += [-normal.inv_cdf(0.5 + (outermost - 0.5) * k / 7) for k in range(1, 8)]
    unit = ((1 << 15) - 1) / max(reals)
    levels = tuple(float(round(real * unit)) for real in sorted(reals))
    scale = Stored(dtype=torch.float32, bits=8, over=over) if over else Stored(dtype=dtype)
    return Grid(f"nf4g{group}{f'x{over}' if over else ''}", levels, group, scale)


def integer_grid_named(name: str) -> Grid | None:
    """``int4`` (a scale per row), ``int4-g32`` (per 32 columns), ``int4z-g32`` (with zero points); None for
    any other name.

    >>> integer_grid_named("int4-g32") == integer_grid(4, 32)
    True
    """
    match = re.fullmatch(r"int([2-8])(z?)(?:-g([1-9]\d{0,5}))?", name)
    if match is None:
        return None
    return integer_grid(int(match[1]), int(match[3] or 0), symmetric=not match[2])
