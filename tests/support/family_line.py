"""The line on the tiny pipeline of any family, with prompts of very different lengths."""

import json
from pathlib import Path

from tiny_line import LINE
from tiny_pipelines import family_folder
from tiny_tokenizers import LONG_CAPTION

from dirotq.pipeline.build import Pipeline, build
from dirotq.pipeline.config import compose_config

SHAPES = ("circle", "star", "square", "line", "cross", "ring", "dot", "arc")


def family_line(root: Path, name: str, *more: str) -> Pipeline:
    """Configure the line of a family, ``more`` being overrides; families share one store."""
    prompts = root / "families.jsonl"
    if not prompts.exists():
        # Every batch of two holds a short and a long prompt.
        texts = [shape if i % 2 else f"{LONG_CAPTION} {shape}" for i, shape in enumerate(SHAPES)]
        rows = [json.dumps({"prompt": text, "seed": i}) + "\n" for i, text in enumerate(texts)]
        prompts.write_text("".join(rows))
    overrides = [
        f"model={family_folder(root, name)}",
        f"prompts.calibration.path={prompts}",
        f"prompts.heldout.path={prompts}",
        f"store={root / 'families'}",
        "method.text_group=64",
        *LINE,
        *more,
    ]
    return build(compose_config(overrides, "dirotq.conf"))
