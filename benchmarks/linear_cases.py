"""Whole packed linears that are measured (docs/kernels.md)."""

from dirotq.kernels.case import Case

FLUX = (
    ("FLUX qkv", 3072, 9216, 1.4, 1.6),
    ("FLUX qkv + mlp", 3072, 21504, 1.5, 1.7),
    ("FLUX mlp up", 3072, 12288, 1.4, 1.6),
    ("FLUX mlp down", 12288, 3072, 1.25, 1.45),
    ("FLUX out", 3072, 3072, 1.05, 1.25),
)
SMALL = (
    ("FLUX qkv", 1024, 3072, 9216),
    ("FLUX qkv + mlp", 1024, 3072, 21504),
    ("FLUX mlp up", 1024, 3072, 12288),
    ("FLUX mlp down", 1024, 12288, 3072),
    ("FLUX out", 1024, 3072, 3072),
    ("PixArt qkv", 4096, 1152, 3456),
    ("PixArt mlp up", 4096, 1152, 4608),
    ("SANA mlp up", 1024, 2240, 11200),
)

LINEARS = (
    *(Case(name=s, m=4608, k=k, n=n, reach=r, stretch=x) for s, k, n, r, x in FLUX),
    *(Case(name=s, m=18432, k=k, n=n, reach=round(r + 0.1, 2)) for s, k, n, r, _ in FLUX),
    *(Case(name=s, m=m, k=k, n=n, reach=1.0, stretch=1.2) for s, m, k, n in SMALL),
    *(Case(name="FLUX out + mlp down", m=m, k=15360, n=3072) for m in (4608, 1536)),
)
"""Whole packed linears: transform, quantize, unpack, product, low-rank branch and bias."""
