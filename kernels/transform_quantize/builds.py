"""What is compiled of ``transform_quantize`` for chips that are not here."""

from typing import Any

import triton.language as tl

from ..build import CHIPS, FP8_CHIPS, Build
from ..formats.activation import POW2_LEVELS
from ..source import Kind
from . import projection, scales
from . import sweeps as kernels
from .reference import POW2_CLIP, RMS_TOP, TINY
from .shapes import DEFAULT, Sweep, project_sweep, rotate_sweep, usual, width_of_c


def builds() -> list[Build]:
    """Every sweep in the configurations that run: b = 32 ... 512, each scale, both containers."""
    found = []
    pointers = {
        "p_x": "*bf16", "p_basis": "*bf16", "p_c": "*bf16", "p_spread": "*bf16", "p_z": "*bf16",
        "p_amax": "*i32", "p_row": "*fp32", "p_scale": "*fp32", "root": "fp32", "one": "fp32",
    }  # fmt: skip
    reads = {
        "p_behind": "*bf16", "p_scale": "*bf16", "p_shift": "*bf16", "p_y": "*bf16",
        "p_parts": "*fp32", "p_squares": "*fp32", "eps": "fp32",
    }  # fmt: skip

    def add(name: str, kernel: Any, constants: dict[str, Any], s: Sweep, **more: Any) -> None:
        types = pointers | more.pop("types", {})
        signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constants}
        aligned = (
            "M", "T", "D", "K", "image_x", "stride_x", "image_behind", "stride_behind",
            "stride_scale", "split", "part", "stride_z", "stride_codes", "tail", "columns",
        )  # fmt: skip
        found.append(
            Build(
                name=f"transform_quantize_{name}", kernel=kernel, signature=signature,
                constants=constants, warps=s.warps, stages=s.stages,
                aligned=tuple(n for n in signature if n in aligned or n.startswith("p_")), **more,
            )
        )  # fmt: skip

    # Blocks, rank, whether columns fill the tiles, source, group of codes that leave ``rotate`` (0:
    # z does, 1: 8-bit floats).
    configurations: tuple[tuple[int, int, bool, Kind, int], ...] = (
        (256, 64, True, "plain", 16), (256, 64, True, "gelu", 16), (256, 64, True, "concat", 16),
        (256, 64, True, "plain", 0), (256, 64, True, "plain", 1), (32, 64, False, "plain", 32),
        (512, 64, True, "plain", 0), (256, 128, True, "plain", 0),
    )  # fmt: skip
    for b, rank, even, kind, group in configurations:
        tile, rms = 128 if b == 512 else 64, group > 0
        shared = {
            "B": min(b, tile), "W": tile, "RP": width_of_c(rank), "EVEN": even,
            "DOT": tl.bfloat16, "CHAIN": False, "FAST": True,
        }  # fmt: skip
        for chips in ((80,), (86,), (89, 120), (90,), (100,)):
            if group == 1 and chips[0] < 89:
                continue
            s = project_sweep(usual(kind, chips[0]), rank, chips[0])
            # What two of 255 registers too few cost, in thousands of instructions.
            spills = 64 if chips[0] not in (90, 100) else 0
            constants = shared | {
                "R": rank, "BM": s.bm, "BK": s.width, "PARTS": 4 if rms else 1,
                "SQUARES": rms and b == 256, "AMAX": not rms, "KIND": kind,
            }  # fmt: skip
            name = f"b{b}-r{rank}-{kind}-{group}"
            if group != 1:
                types = reads | ({"p_c": "*fp32", "p_amax": "*fp32"} if rms else {})
                add(
                    f"project-{name}", projection.project, constants, s, chips=chips, types=types,
                    spills=spills,
                )  # fmt: skip
            if kind == "concat":  # rotated as its parts
                continue
            types = reads
            if rms:
                out = "*fp8e4nv" if chips[0] >= 89 else "*i8"
                types = reads | {"p_z": out, "p_amax": "*fp32"}
            for r in (rank, 0) if name == "b256-r64-plain-0" else (rank,):
                s = rotate_sweep(usual(kind, chips[0]), b, r, chips[0])
                constants = shared | {
                    "SUB": max(1, b // tile), "PROJECT": r > 0, "BM": s.bm, "G": group, "QMAX": 7,
                    "LEVELS": POW2_LEVELS, "CLIP": POW2_CLIP, "GELU": kind == "gelu",
                    "STACKED": s.stacked,
                }  # fmt: skip
                name_r = f"rotate-{name}" + ("" if r else "-unprotected")
                add(
                    name_r, kernels.rotate, constants, s, chips=chips, types=types, spills=spills
                )  # fmt: skip
    small: Any = {"tensor_core": False, "types": reads}
    one_row = Sweep(bm=16)
    add(
        "gather", projection.gather, {"RP": 64, "PARTS": 4, "BM": 16, "CHAIN": False}, one_row,
        **small,
    )  # fmt: skip
    add("normalize", projection.normalize, {"BD": 4096, "SQUARES": True}, one_row, **small)
    for fp8 in (True, False):
        codes = {"p_codes": "*fp8e4nv" if fp8 else "*i8"}
        constants = {
            "R": 64, "RP": 64, "RT": 80, "TAIL": fp8, "T": 256 if fp8 else 0, "PARTS": 4,
            "SQUARES": 4, "QMAX": 7, "UNIT": 16.0, "TOP": RMS_TOP, "TINY": TINY, "BM": 16,
            "CHAIN": False,
        }  # fmt: skip
        add(
            f"scale-rows-{'fp8' if fp8 else 'int8'}", scales.scale_rows, constants, one_row,
            tensor_core=False, types=reads | {"p_scale": "*fp32"} | codes,
            chips=FP8_CHIPS if fp8 else CHIPS,
        )  # fmt: skip
    s = DEFAULT["plain"].round_rows
    for scale, g, bits, fp8, tail in (
        ("pow2", 16, 4, True, True), ("pow2", 64, 4, True, True), ("token", 64, 4, True, True),
        ("pow2", 16, 4, False, False), ("token", 64, 8, False, False),
        ("group", 64, 4, True, False), ("group", 128, 4, False, False),
    ):  # fmt: skip
        constants = {
            "R": 64, "RP": 64, "RT": 80, "TAIL": tail, "T": 256 if tail else 0,
            "SCALE": scale, "G": g,
            "QMAX": 2 ** (bits - 1) - 1, "UNIT": 1.0, "LEVELS": POW2_LEVELS, "CLIP": POW2_CLIP,
            "TINY": TINY, "BM": s.bm, "BW": s.width, "CHAIN": False,
        }  # fmt: skip
        add(
            f"round-{scale}{g}-{bits}-{'fp8' if fp8 else 'int8'}", kernels.round_rows, constants, s,
            types={"p_codes": "*fp8e4nv" if fp8 else "*i8"}, tensor_core=False,
            chips=FP8_CHIPS if fp8 else CHIPS,
        )  # fmt: skip
    return found
