"""Whether the fast path changes images: the embedded model, its packed form run in three ways."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import dirotq
from dirotq.benchmarks.forward_rows import ATTENTION, FOLDER, FUSED, UNFUSED, Row
from dirotq.benchmarks.model_inputs import Case
from dirotq.benchmarks.ways import WAYS
from dirotq.evaluate.fidelity import psnr
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import PromptSet
from dirotq.tuning.timing import summary

CAPTIONS = "assets://prompts/tiny_heldout.jsonl"
BATCHED = "ours, unfused, batch 8"
COUNT = 8


def compared(store: str, overrides: tuple[str, ...] = (), *, count: int = COUNT) -> Iterator[Row]:
    """PSNR against unfused images made one by one: of unfused ones made together, of fused ones.

    Another batch size is the change that anyone accepts; fusing may cost no more than that.
    """
    made = dirotq.compress("tiny_flux", *overrides, store=store, until="pack")
    prompts = PromptSet(
        path=CAPTIONS, start=0, count=count, column="prompt", subset=None, split="train"
    ).load()
    source = DiffusersModel(path="assets://tiny-flux", call={}, base=None, lora=[])
    call = source.call_arguments()
    pipe: Any = dirotq.load(made.folder, dtype=torch.bfloat16)

    def one_by_one() -> Tensor:
        return torch.cat([generate(pipe, [prompt], call) for prompt in prompts])

    case = Case("flux", call["height"])
    WAYS[UNFUSED].apply(pipe.transformer, case)
    want = one_by_one()
    yield row(BATCHED, generate(pipe, prompts, call), want)
    for who in (FUSED, ATTENTION):
        WAYS[who].apply(pipe.transformer, case)
        yield row(who, one_by_one(), want)


def row(contestant: str, got: Tensor, want: Tensor) -> Row:
    """Mean over images, with the percentiles of single ones."""
    each = psnr(got, want).tolist()
    spread = summary(each)
    return Row(
        section="quality", case="tiny_flux", contestant=contestant, what="",
        value=sum(each) / len(each), p20=spread.p20, p80=spread.p80, weights=FOLDER,
        note=f"PSNR in dB against ours, unfused, batch 1; {len(each)} images in bf16",
    )  # fmt: skip
