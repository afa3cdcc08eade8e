"""A report.json with every part that a page can show, and names that try to be markup."""

from typing import Any

PROMPT = "<script>alert('x')</script> & a star"


def site(name: str, kind: str, rank: int) -> dict[str, Any]:
    """One row of ``report["sites"]``."""
    return {
        "site": name,
        "kind": kind,
        "dim": 8,
        "outputs": 24,
        "rank": rank,
        "format": "W4A4",
        "sqnr_db": 21.5,
        "by_timestep": [20.0, None, 23.0],
        "why": "fixed: 4 of 8 directions hold 93.1% of the energy",
    }


def whole_report() -> dict[str, Any]:
    """Two images, two sites, three timesteps."""
    scores = {"mean": 0.875, "colour": 1.0}
    image = {"prompt": PROMPT, "seed": 1, "psnr": 31.4, "ssim": 0.91, "floor": {"psnr": 61.5}}
    return {
        "model": "org/model + <b>style</b> x 0.8",
        "method": "dirotq",
        "text_encoders": [],
        "running": {
            how: {"load": 2e9, "denoise": 3e9} for how in ("none", "none, tiled", "model", "group")
        },
        "date": "2026-11-30T08:00:00Z",
        "command": "dirotq compress 'model=a & b' rank.r=16",
        "settings": {"rank.r": 16, "rank.energy": None, "method.act_bits": 4},
        "fingerprints": {"pack": "pack/0123456789abcdef"},
        "versions": {"torch": "2.13.0"},
        "verdict": {"level": "small", "headline": "Good: <so>", "reasons": ["One reason."]},
        "resumed": 0,
        "timesteps": [0.9, 0.5, 0.1],
        "parameters": 8000,
        "images": [image, image | {"psnr": 30.0, "prompt": "a worse one", "seed": 2}],
        "attributes": {"original": scores, "packed": scores},
        "scores": {
            "psnr": {
                "packed": {"mean": 31.4, "low": 30.25, "high": 32.5},
                "floor": {"mean": 61.5, "low": 60.0, "high": 63.0},
            },
            "clip": {
                "packed": {"mean": 26.5, "low": 25.0, "high": 28.0},
                "original": {"mean": 26.75, "low": 25.0, "high": 28.0},
                "difference": {"mean": -0.25, "low": -0.5, "high": 0.00001},
            },
            "fid": {"packed": {"mean": 0.125}, "floor": {"mean": 0.0625}},
        },
        "sites": [site("block.qkv", "block", 4), site("block.norm", "modulator", 0)],
        "bytes": {"codes": 4000, "scales": 100, "basis": 0, "total": 4100, "original": 16000},
        "bits_per_parameter": 4.1,
        "seconds_per_image": {"original": 1.0, "packed": 2.0},
        "device": "CPU, reference path",
        "devices": {"packed": "CPU, reference path", "original": "some card"},
        "dtype": "float32",
        "size": [128, 128],
        "inputs": {"pack": "pack/0123456789abcdef"},
        "metrics": {
            "psnr": 31.4,
            "ssim": 0.91,
            "bits_per_parameter": 4.1,
            "compression": 3.9,
            "seconds_per_image": 2.0,
            "seconds_per_image_original": 1.0,
            "attributes": 0.875,
            "attributes_original": 0.875,
        },
    }
