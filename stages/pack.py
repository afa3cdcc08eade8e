"""The folder people download: a standard diffusers pipeline whose transformer is packed."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.pack_int4 import pack_int4
from dirotq.models.source import CALL_FILE, IGNORED, DiffusersModel
from dirotq.models.swap import footprint, swap_sites
from dirotq.pipeline.artifact import Artifact
from dirotq.plan import SitePlan, read_plan
from dirotq.quantizer import STORED, DirotqConfig, mark_packed
from dirotq.tensors import load_site, site_file

CARD = """# {name}, packed to 4 bits by DiRotQ

```python
import dirotq
pipe = dirotq.load("{name}")          # or, after `import dirotq`: DiffusionPipeline.from_pretrained
image = pipe("...", **{call}).images[0]
```

{parameters:.2f} M transformer parameters in {megabytes:.2f} MB: {bits:.2f} bits per parameter,
everything counted (codes, scales, bases, protected columns, all layers kept in 16 bits).
"""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Write ``model/``: the source pipeline with a packed transformer (layout L1, docs/method.md).

    ``shard``  largest weights file, in the notation of ``save_pretrained`` ("5GB")
    """

    version: ClassVar[str] = "1"

    model: DiffusersModel
    shard: str

    def run(
        self, out: Path, *, rank: Artifact, gptq: Artifact, fuse: Artifact
    ) -> Mapping[str, float]:
        plan = read_plan(rank.file("plan.json"))
        folder = out / "model"
        _copy_pipeline(self.model.folder(), folder)
        transformer: Any = self.model.transformer(STORED)
        parameters = sum(p.numel() for p in transformer.parameters())
        plans = {entry.site: entry for entry in plan}
        swap_sites(transformer, plans, lambda site: _packed(plans[site], gptq, fuse))
        mark_packed(transformer, DirotqConfig.of((e.site, e.spec) for e in plan))
        transformer.save_pretrained(folder / "transformer", max_shard_size=self.shard)
        call = self.model.call_arguments()
        (folder / CALL_FILE).write_text(json.dumps(call, indent=2, sort_keys=True) + "\n")
        size = sum(footprint(transformer).values())
        card = CARD.format(
            name=Path(self.model.path).name,
            call=call,
            parameters=parameters / 1e6,
            megabytes=size / 1e6,
            bits=8 * size / parameters,
        )
        (folder / "README.md").write_text(card)
        return {
            "transformer_megabytes": size / 1e6,
            "bits_per_parameter": 8 * size / parameters,
            "compression": 16 * parameters / (8 * size),
        }


def _packed(entry: SitePlan, gptq: Artifact, fuse: Artifact) -> QuantLinear:
    """One site's packed linear: codes and scales of ``gptq``, everything else of ``fuse``."""
    file = f"sites/{site_file(entry.site.name)}"
    quantized, fused = load_site(gptq.file(file)), load_site(fuse.file(file))
    module = QuantLinear(entry.spec, bias=entry.site.bias, device="meta")
    buffers = {"qweight": pack_int4(quantized["codes"]), "wscale": quantized["scale"]} | fused
    module.load_state_dict(buffers, strict=True, assign=True)
    return module


def _copy_pipeline(source: Path, target: Path) -> None:
    """Everything of the source folder but its transformer's files, its card and hidden files."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        skipped = relative.parts[0] == "transformer" or path.name in IGNORED
        if path.is_file() and not skipped and not path.name.startswith("."):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)
            if path.name == "config.json":
                _neutral_dtype(target / relative)


def _neutral_dtype(config: Path) -> None:
    """Let a component load in float32 unless told otherwise, as diffusers' own components do.

    transformers takes the dtype noted in a config, so a pipeline loaded without one would mix
    bfloat16 text encoders with a float32 denoiser and fail at its first call.
    """
    values = json.loads(config.read_text())
    noted = {"dtype", "torch_dtype"} & values.keys()
    if noted:
        values |= dict.fromkeys(noted, "float32")
        config.write_text(json.dumps(values, indent=2) + "\n")
