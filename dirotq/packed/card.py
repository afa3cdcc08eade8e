"""The model card of a packed pipeline (README.md): what it was made of, and how it is used.

https://huggingface.co/docs/hub/model-cards. A card that somebody wrote is never replaced; in one of
ours only the name and the figures are kept up to date.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from posixpath import commonpath
from typing import Any

from huggingface_hub import ModelCardData

from dirotq.kernels.formats.spec import QuantSpec
from dirotq.models.family import Site

README = "README.md"
PAIRS = "pairs.png"
LARGEST = 1 << 20
"""Bytes of a card, or of another text beside a model, that is read."""
OURS = "<!-- Written by DiRotQ. -->"
OTHERS = "model card has been automatically generated"
"""What diffusers and huggingface_hub put where there is no card."""
FIGURES = "<!-- figures -->"
CARRIED = ("license", "license_name", "license_link", "pipeline_tag", "language")
"""Facts of the base model's card that hold for the packed model as well."""
NEEDED = ("torch", "triton", "diffusers", "transformers")

TEXT = """---
{head}---
{ours}
# {name}, packed to 4 bits by DiRotQ

{pipeline} with a transformer of {parameters:.2f} M parameters in {megabytes:.2f} MB: {bits:.2f}
bits per parameter, everything counted (codes, scales, bases, protected columns, all layers kept in
16 bits).

## Use

diffusers knows this format once `dirotq` is imported. Without it, loading ends with "Unknown
quantization type, got dirotq".

```python
import torch
import dirotq  # first: pip install dirotq
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", dtype=torch.bfloat16).to("cuda")
image = pipe("...", **{call}).images[0]
```

`dirotq.load(folder)` does the same for a folder on disk, and holds every file against `SHA256SUMS`
first; so does `sha256sum -c SHA256SUMS`.

Needs {needed}.

## Made from

{base} Licence: {licence}.

## What is packed

{linears} linears in {sites} sites (a site is all linears that read one tensor) are packed. {kept}
linears stay in 16 bits{kept_names}.

| linears | number | format | settings | protected directions |
|---|---|---|---|---|
{table}

## Figures

{figures}
"""
SHOWN = f"\n\n![16-bit images above, packed ones below]({PAIRS})"
UNMEASURED = (
    "None were measured of this folder: `dirotq compress` compares it with the 16-bit model."
)


@dataclass(frozen=True, slots=True)
class Base:
    """What is known of the 16-bit model.

    ``model``   its id on the Hub, or None
    ``said``    a sentence about it
    ``carried`` facts of its card (:data:`CARRIED`)
    """

    model: str | None = None
    said: str = "Which 16-bit model this is made from is not recorded."
    carried: Mapping[str, Any] = field(default_factory=dict)


def write_card(
    name: str,
    base: Base,
    entries: Sequence[tuple[Site, QuantSpec]],
    *,
    pipeline: str,
    parameters: int,
    size: int,
    kept: Sequence[str],
    call: Mapping[str, Any],
) -> str:
    """Return the card of a packed pipeline.

    pipeline    the class's name
    parameters  of the 16-bit transformer; ``size`` bytes of the packed one
    kept        paths of its linears that stay in 16 bits
    call        arguments that it is called with
    """
    facts = {
        "library_name": "diffusers",
        "base_model": base.model,
        "base_model_relation": "quantized" if base.model else None,
        "tags": ["dirotq", "4-bit", "quantized"],
        "license": "unknown",
        **base.carried,
    }
    rows, names = _rows(entries), sorted(set(map(_pattern, kept)))
    return TEXT.format(
        head=ModelCardData(**facts).to_yaml() + "\n",
        ours=OURS,
        name=name,
        pipeline=pipeline,
        parameters=parameters / 1e6,
        megabytes=size / 1e6,
        bits=8 * size / parameters,
        call=dict(call),
        needed=_needed(),
        base=base.said,
        licence=_licence(base.carried),
        linears=sum(len(site.linears) for site, _ in entries),
        sites=len(entries),
        kept=len(kept),
        kept_names=f" ({', '.join(f'`{n}`' for n in names)})" if names else "",
        table="\n".join(rows),
        figures=_between(UNMEASURED),
    )


def is_ours(card: str) -> bool:
    """Tell whether nobody but programs wrote a card: ours, diffusers', huggingface_hub's."""
    return OURS in card or OTHERS in card


def renewed(
    card: str, name: str, report: Mapping[str, Any] | None = None, *, pairs: bool = False
) -> str:
    """Return a card of ours under another name, with the figures of ``validate``'s report.

    pairs  whether its sample images lie beside the card
    """
    named = re.sub(r'from_pretrained\("[^"\n]*"', lambda _: f'from_pretrained("{name}"', card)
    titled = re.sub(
        r"^# .*(?=, packed to 4 bits by DiRotQ$)", lambda _: f"# {name}", named, flags=re.M
    )
    if report is None or titled.count(FIGURES) != 2:
        return titled
    before, _, after = titled.split(FIGURES)
    return before + _between(figures(report) + (SHOWN if pairs else "")) + after


def figures(report: Mapping[str, Any]) -> str:
    """Return the scores of a report as a table, with their intervals."""
    known = {name for line in report["scores"].values() for name in line}
    sets = [name for name in ("packed", "original", "floor", "difference") if name in known]
    lines = [f"| metric | {' | '.join(sets)} |", f"|---|{'---|' * len(sets)}"]
    for metric, line in report["scores"].items():
        lines.append(f"| {metric} | {' | '.join(_interval(line.get(s)) for s in sets)} |")
    height, width = report["size"]
    lines += [
        "",
        f"{len(report['images'])} held-out prompts at {width} x {height}, {report['dtype']}, on "
        f"{report['device']}; [95 % bootstrap interval]. `original` is the 16-bit model; `packed` "
        "is compared with its images where a metric compares.",
    ]
    return "\n".join(lines)


def _between(text: str) -> str:
    return f"{FIGURES}\n{text}\n{FIGURES}"


def _interval(numbers: Mapping[str, float] | None) -> str:
    if numbers is None:
        return ""
    low, high = numbers.get("low"), numbers.get("high")
    ends = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
    return f"{numbers['mean']:.4g}{ends}"


def _rows(entries: Sequence[tuple[Site, QuantSpec]]) -> list[str]:
    groups: dict[tuple[str, str, str], list[tuple[Site, QuantSpec]]] = defaultdict(list)
    for site, spec in entries:
        groups[_names(site), spec.format, _settings(spec)].append((site, spec))
    return [
        f"| {names} | {sum(len(site.linears) for site, _ in alike)} | {form} | {settings} "
        f"| {_range([spec.rank for _, spec in alike])} |"
        for (names, form, settings), alike in groups.items()
    ]


def _names(site: Site) -> str:
    paths = [_pattern(path) for path in site.linears]
    parent = commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")
    if len(paths) == 1:
        return f"`{paths[0]}`"
    return f"`{parent}`: " + ", ".join(f"`{path.removeprefix(parent + '.')}`" for path in paths)


def _settings(spec: QuantSpec) -> str:
    """Return the fields of a spec that say how it rounds, in the words of files."""
    fields = spec.to_dict()
    weights = spec.weights
    of_group = weights.granularity == "group" and weights.element != "e2m1"
    size = f" of {weights.group}" if of_group else ""
    said = [f"weights: {fields['weight_scale']}{size}"]
    if fields["act_bits"] < 16:
        said.append(f"activations: {fields['act_scale']}")
    if fields["transform"] == "dense":
        said.append("dense rotation")
    elif fields["block"] > 1:
        said.append(f"{fields['transform']} of {fields['block']}")
    return ", ".join(said)


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path, count=1)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _licence(carried: Mapping[str, Any]) -> str:
    name = carried.get("license_name") or carried.get("license")
    if not name or name == "unknown":
        return "unknown; ask for the base model's before you use or share this"
    link = carried.get("license_link")
    return f"{name}, as the base model's" + (f" ({link})" if link else "")


def _needed() -> str:
    """Return what this version was made and tested with, as the package requires it."""
    try:
        wanted = metadata.requires("dirotq") or []
        version = metadata.version("dirotq")
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return "dirotq, and the versions of torch and diffusers that it requires"
    plain = [line.partition(";")[0].strip() for line in wanted if "extra ==" not in line]
    ours = [line for line in plain if re.match(r"[\w-]+", line)[0] in NEEDED]  # type: ignore[index]
    return ", ".join(f"`{line}`" for line in (f"dirotq>={version}", *ours))
