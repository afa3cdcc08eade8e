"""Let a judge compare images of the same prompts: packed against 16 bit, or two packed models."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.evaluate.images import has_images, read_images
from dirotq.evaluate.judging.answer import CRITERIA
from dirotq.evaluate.judging.asking import ask_all
from dirotq.evaluate.judging.backend import Backend
from dirotq.evaluate.judging.page import write_page
from dirotq.evaluate.judging.questions import SIDES, Pair, Question, Side, questions
from dirotq.evaluate.judging.rubric import Rubric
from dirotq.evaluate.judging.statistics import summarize
from dirotq.evaluate.scoring import FLOOR, ORIGINAL, PACKED, stills
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.store import ArtifactStore
from dirotq.pipeline.units import Units
from dirotq.sources.prompts import Prompt, PromptSet

log = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"
VALIDATED = re.compile(r"validate/[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sets of images of the same prompts.

    ``images``  per side, the Zarr group and the name of its images
    ``labels``  per side, what they are
    """

    images: Mapping[Side, tuple[Path, str]]
    labels: Mapping[Side, str]

    def image(self, side: Side, index: int) -> Tensor:
        """[3, H, W] in [0, 1]; of a video, its middle frame."""
        tree, name = self.images[side]
        return stills(read_images(tree, name, [index]))[0]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Ask a judge which of two images of one prompt is better, in both orders (docs/judge.md).

    ``against``   None: the 16-bit images; or ``validate/FINGERPRINT`` of another packed model
    ``control``   compare the 16-bit images with themselves, made in other batches, too
    ``count``     prompts, from the first; None: all
    ``repeats``   of every question
    ``attempts``  answers of the wrong form before a question counts as invalid
    ``failures``  share of the questions that may fail for good
    ``pairs``     lost pairs shown in judge.html
    ``store``     where ``against`` is

    Writes ``answers.jsonl`` (every raw answer; a run that goes on asks nothing again that is in
    it), ``judge.json`` (every number) and ``judge.html`` (one file, nothing to fetch).
    """

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True

    prompts: PromptSet
    backend: Backend
    rubric: Rubric
    against: str | None
    control: bool
    count: int | None
    repeats: int
    attempts: int
    pairs: int
    failures: float = untracked()
    store: str = untracked()

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("attempts", 1), ("pairs", 0), ("count", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"judge.{name}={value}: use at least {least}")
        if not 0 <= self.failures <= 1:
            raise ConfigError(f"judge.failures={self.failures}: it is a share, from 0 to 1")
        if self.against is not None and not VALIDATED.fullmatch(self.against):
            raise ConfigError(
                f"judge.against={self.against} names no validated model; give validate/ and the 16 "
                "digits of its fingerprint, as `dirotq plan` prints it, or null for the 16-bit "
                "images"
            )

    def check(self) -> None:
        """Raise ConfigError, before anything runs, for a judge or a rival that isn't there."""
        self.backend.check()
        prompts = self._prompts()
        if self.against is not None:
            _refuse_other_prompts(self._rival(self.against), prompts)

    def run(self, out: Path, *, reference: Artifact, validate: Artifact) -> Mapping[str, float]:
        # The run keeps its own artifacts from other processes; the rival is not one of them.
        with self._rival(self.against).held() if self.against else nullcontext():
            return self._judge(out, reference, validate)

    def _judge(self, out: Path, reference: Artifact, validate: Artifact) -> Mapping[str, float]:
        prompts = self._prompts()
        _refuse_other_prompts(validate, prompts)
        comparisons = self._comparisons(reference, validate)
        asked = questions(comparisons, len(prompts), self.repeats)
        log.info("%d questions to %s", len(asked), self.backend.name)

        def pair_of(question: Question) -> Pair:
            comparison, index = comparisons[question.comparison], question.index
            order = SIDES if question.first == SIDES[0] else SIDES[::-1]
            return Pair(prompts[index], *(comparison.image(side, index) for side in order))

        Units(out, apart=[ANSWERS])  # nothing but the answers outlives an interrupted run
        rows = ask_all(
            self.backend,
            self.rubric,
            asked,
            pair_of,
            out / ANSWERS,
            attempts=self.attempts,
            failures=self.failures,
        )
        found = summarize(rows)
        for name, comparison in comparisons.items():
            found[name]["labels"] = dict(comparison.labels)
        metrics = _headline(found)
        report = {
            "judge": self.backend.name,
            "rubric": self.rubric.version,
            "prompts": len(prompts),
            "repeats": self.repeats,
            "comparisons": found,
            "inputs": {a.stage: str(a) for a in (reference, validate)},
            "metrics": metrics,
        }
        (out / "judge.json").write_text(json.dumps(report, indent=1) + "\n")
        rows = [row for row in rows if row["comparison"] == "packed"]
        write_page(out / "judge.html", report, rows, comparisons["packed"].image, self.pairs)
        return metrics

    def _prompts(self) -> list[Prompt]:
        prompts = self.prompts.load()
        if self.count is not None and self.count > len(prompts):
            raise ConfigError(
                f"judge.count={self.count}, and there are {len(prompts)} held-out prompts; use at "
                "most that many, or more of them with prompts.heldout.count"
            )
        return prompts[: self.count]

    def _comparisons(self, reference: Artifact, validate: Artifact) -> dict[str, Comparison]:
        originals = reference.tree("images.zarr")
        packed = (validate.tree("images.zarr"), PACKED)
        rival, label = (originals, ORIGINAL), "16 bit"
        if self.against is not None:
            rival, label = (self._rival(self.against).tree("images.zarr"), PACKED), self.against
        found = {
            "packed": Comparison(
                {"reference": rival, "candidate": packed},
                {"reference": label, "candidate": str(validate)},
            )
        }
        if self.control:
            if not has_images(originals, FLOOR):
                raise ConfigError(
                    f"{reference} holds each 16-bit image once, and judge.control=true compares "
                    "two of them; use reference.floor=true, or judge.control=false to go without"
                )
            found["control"] = Comparison(
                {"reference": (originals, ORIGINAL), "candidate": (originals, FLOOR)},
                {"reference": "16 bit", "candidate": "16 bit, made in other batches"},
            )
        return found

    def _rival(self, name: str) -> Artifact:
        found = ArtifactStore(self.store).get(*name.split("/"))
        if found is None:
            raise ConfigError(
                f"judge.against={name} is not in the store {self.store}; run the line that makes "
                "it there, or name another store with store=FOLDER"
            )
        return found


def _refuse_other_prompts(validated: Artifact, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError unless the images are those of ``prompts``, in their order."""
    report = json.loads(validated.file("report.json").read_text())
    shown = [(image["prompt"], image["seed"]) for image in report["images"]]
    for index, prompt in enumerate(prompts):
        if shown[index : index + 1] != [(prompt.text, prompt.seed)]:
            what = f"{shown[index]}" if index < len(shown) else "nothing"
            raise ConfigError(
                f"{validated} has images of other prompts or seeds: its image {index} is of "
                f"{what}, prompts.heldout has {(prompt.text, prompt.seed)}. Only images of the "
                "same prompts and noise can be compared: run both lines with the same "
                "prompts.heldout (a smaller judge.count may do)"
            )


def _headline(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the scalars that a multirun compares; shares that were not found are left out."""
    metrics: dict[str, float] = {}
    for name, comparison in found.items():
        prefix = "" if name == "packed" else f"{name}_"
        for criterion in CRITERIA:
            for statistic in ("win_rate", "first_slot"):
                if (share := comparison[criterion][statistic]) is not None:
                    metrics[f"{prefix}{statistic}_{criterion}"] = share["mean"]
        requests = comparison["requests"]
        metrics[f"{prefix}unanswered"] = 1 - requests["answered"] / requests["asked"]
    return metrics
