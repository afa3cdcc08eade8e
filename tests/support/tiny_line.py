"""A random FLUX pipeline small enough to run the whole line in seconds, and that line itself.

The folder is what `save_pretrained` writes. Nothing in it is zero: modulators and the last layer
are random too (a zero modulator would hide every error behind a closed gate), and a few input
channels are outliers, as in trained models.
"""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import zarr
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from dirotq.assets import tiny_flux
from dirotq.kernels import second_moment
from dirotq.pipeline import dag
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.build import Pipeline, build
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.settings import make
from dirotq.pipeline.store import ArtifactStore
from dirotq.quantize.moments import moment, read_stored, write_moment
from dirotq.quantize.plan import Method
from dirotq.quantize.tensors import save_site

CAPTIONS = ("a large red circle at the top left", "two small blue stars", "a green square", "dots")
WIDTH = 64
TEXT = 192
POOLED = 128
CALL = {
    "num_inference_steps": 3,
    "guidance_scale": 0.0,
    "height": 32,
    "width": 32,
    "max_sequence_length": 8,
}
FP4_METHODS = ("dirotq_nvfp4", "dirotq_mxfp4", "rtn_nvfp4", "rtn_mxfp4")
METHODS = (
    "dirotq", "dirotq_dense", "rtn", "dirotq_w4a8", "groups", "levels",
    "smoothquant", "quarot", "convrot", "quartz", "svdquant", "absorb", *FP4_METHODS,
)  # fmt: skip
"""Methods of conf/method, ``groups``: the default one with group scales on both sides, and
``levels``: with LM4 weights."""

LINE = (
    "capture.batch=2",
    "capture.calls=12",
    "capture.rows=64",
    "rank.r=16",
    "rank.sensitive=null",
    "reference.batch=2",
    "validate.batch=2",
    "validate.pairs=2",
    "prompts.calibration.count=6",
    "prompts.heldout.start=6",
    "prompts.heldout.count=2",
    "device=cpu",
)


def build_transformer(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """One double-stream and one single-stream block, every weight random, in float32."""
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": WIDTH // 32,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "guidance_embeds": False,
        "axes_dims_rope": (8, 12, 12),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(**config | changes)
        with torch.no_grad():
            for name, module in transformer.named_modules():
                if isinstance(module, nn.Linear):
                    gain = 0.3 if "norm" in name else 1.0
                    nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
                    nn.init.normal_(module.bias, std=0.05)
            for name, parameter in transformer.named_parameters():
                if name.endswith("norm1.linear.weight"):
                    parameter[-3:] *= 8  # the last gates: outlier channels of the residual stream
    return transformer.eval()


@functools.cache
def model_folder(root: Path) -> Path:
    """The pipeline's folder under ``root``, written once per process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip, t5 = tiny_flux.train_tokenizers(CAPTIONS)
        autoencoder = tiny_flux.build_autoencoder()
        autoencoder.register_to_config(shift_factor=0.0, scaling_factor=1.0)
        pipeline = FluxPipeline(
            scheduler=tiny_flux.build_scheduler(1.0),
            vae=autoencoder.eval(),
            text_encoder=tiny_flux.build_clip(clip).eval(),
            tokenizer=clip,
            text_encoder_2=tiny_flux.build_t5(t5).eval(),
            tokenizer_2=t5,
            transformer=build_transformer(),
        )
    folder = root / "model"
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(CALL))
    return folder


@functools.cache
def prompt_file(root: Path) -> Path:
    """Eight prompts as JSONL."""
    texts = [*2 * CAPTIONS[:3], CAPTIONS[3], "a small red square"]  # the last two are held out
    rows = [{"prompt": text, "seed": 100 + i} for i, text in enumerate(texts)]
    file = root / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def method(name: str, *more: str, **changes: Any) -> Method:
    """A method of the config tree (or ``groups``), with overrides and with fields replaced."""
    return dataclasses.replace(_method(name, more), **changes)


@functools.cache
def _method(name: str, more: tuple[str, ...]) -> Method:
    chosen = compose_config([*_method_overrides(name), *more], "dirotq.conf").method
    made: Method = make(chosen, "method")
    return made


def overrides(root: Path, store: Path, *more: str) -> list[str]:
    """What ``dirotq compress`` would be told; ``method=groups`` and ``levels`` are
    understood here only.

    Of r = 16 nothing is said where another rank is chosen (``rank=budget``).
    """
    file = prompt_file(root)
    chosen = any(o.startswith("rank=") for o in more)
    return [
        f"model={model_folder(root)}",
        f"prompts.calibration.path={file}",
        f"prompts.heldout.path={file}",
        f"store={store}",
        *(o for o in LINE if not (chosen and o.startswith("rank."))),
        *(m for o in more if o.startswith("method=") for m in _method_overrides(o[7:])),
        *(o for o in more if not o.startswith("method=")),
    ]


def configured(root: Path, store: Path, *more: str) -> Pipeline:
    """The line that the real config tree makes of the tiny pipeline."""
    return build(compose_config(overrides(root, store, *more), "dirotq.conf"))


def run(built: Pipeline) -> dict[str, Artifact]:
    """Run it; {stage: artifact}."""
    outcomes = dag.run(built.steps, built.store, built.executor)
    return {name: outcome.artifact for name, outcome in outcomes.items()}


def stage(built: Pipeline, name: str) -> Any:
    """One stage object of a line."""
    return next(step.stage for step in built.steps if step.name == name)


def run_stage(stage: Any, out: Path, **inputs: Artifact) -> dict[str, float]:
    """Run one stage into a folder of its own, outside of any store; its metrics."""
    out.mkdir(parents=True, exist_ok=True)
    return dict(stage.run(out, **inputs))


def publish(store: Path, stage: str, write: Callable[[Path], None]) -> Artifact:
    """An artifact with whatever ``write`` puts into its data folder."""
    with ArtifactStore(store).create(stage, {"made": "by a test"}) as draft:
        write(draft.data)
    assert draft.artifact is not None
    return draft.artifact


def with_moment(
    capture: Artifact, store: Path, site: str, change: Callable[[Tensor], Tensor]
) -> Artifact:
    """A capture artifact like ``capture``, the second moment of one site changed."""

    def write(data: Path) -> None:
        shutil.copytree(capture.data, data, dirs_exist_ok=True)
        group = zarr.open_group(data / "moments.zarr", mode="r+")
        attributes = group[site].attrs
        s_DD = change(moment(read_stored(group, site), "cpu"))
        total = pack_moment(s_DD) * attributes["tokens"]
        write_moment(group, site, len(s_DD), attributes["tokens"], total=total, rows=None)

    return publish(store, "capture", write)


def with_spectra(store: Path, spectra: Mapping[str, list[float]]) -> Artifact:
    """A basis artifact in which sites have these variances, ascending, and no vectors."""

    def write(data: Path) -> None:
        for site, variances in spectra.items():
            found = torch.tensor(variances, dtype=torch.float64)
            content = {"variances": found, "energy": found.sum().reshape(1)}
            save_site(data / "sites", site, content)

    return publish(store, "basis", write)


def pack_moment(s_DD: Tensor) -> Tensor:
    """The block triangle of a symmetric matrix (kernels/second_moment)."""
    dim = len(s_DD)
    total = second_moment.new(dim, s_DD.device)
    variances, vectors = torch.linalg.eigh(s_DD.double())
    # The layout is made by accumulating rows: those of a square root, signs apart.
    for sign in (1, -1):
        kept = (sign * variances).clamp_min(0).sqrt()
        part = second_moment.new(dim, s_DD.device)
        second_moment.accumulate(part, (vectors * kept).mT.float().contiguous())
        total += sign * part
    return total


def tree_bytes(folder: Path) -> Mapping[str, bytes]:
    """Every file below ``folder`` with its content; how long a unit took is none."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "times.json":
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
            if path.parent.name == ".units":
                took = rb'\n  "seconds": [^\n]*'
                found[path.relative_to(folder).as_posix()] = re.sub(took, b"", path.read_bytes())
    return found


def _method_overrides(name: str) -> list[str]:
    if name == "groups":
        return ["weight_format=int4_group", "act_format=int4_group"]
    if name == "levels":
        return ["weight_format=lm4_channel"]
    return [f"method={name}"]
