"""One small artifact, published."""

import json
import math
from pathlib import Path
from typing import Any

from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.manifest import sealed
from dirotq.pipeline.store import ArtifactStore

__all__ = ["RECIPE", "publish", "rewrite"]

RECIPE = {"stage": {"class": "toy", "scale": 1}, "inputs": {}}


def publish(store: ArtifactStore, recipe: Any = RECIPE, **options: Any) -> Artifact:
    """Files one.txt and tree/deep/two.txt; options as of ``ArtifactStore.create``."""
    with store.create("toy", recipe, **options) as draft:
        if draft.artifact is None:
            (draft.data / "tree" / "deep").mkdir(parents=True)
            (draft.data / "one.txt").write_text("one")
            (draft.data / "tree" / "deep" / "two.txt").write_text("two")
            draft.metrics["psnr"] = math.inf
    return draft.artifact


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file, and the digest of a manifest with them."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(sealed(content) if "digest" in content else content))
