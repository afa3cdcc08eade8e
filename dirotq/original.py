"""The 16-bit model that a packed folder was made from, for `dirotq generate --compare`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dirotq.errors import ConfigError, DirotqError
from dirotq.files.json_file import INDEX, read_json
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.quoting import setting
from dirotq.pipeline.settings import make
from dirotq.pipeline.stage import recipe

GIVE = "give it: --compare ORIGINAL (a name of conf/model, a folder or a hub id)"
CHOOSE = ("model", "experiment")
"""Settings that say which model a run is about."""


def original_of(folder: Path, given: str, config: str) -> Any:
    """Return the DiffusersModel that ``folder`` was packed from.

    folder  the packed folder; in an artifact of `pack`, whose provenance names the model
    given   what the user says it is; empty: what the provenance says
    config  package of the config tree

    Raises ConfigError if nothing says which model it is, or if that is not what was packed.
    """
    if given:
        named = _model([f"model={given.removeprefix('model=')}"], config)
        _refuse_another(folder, named, given)
        return named
    place = folder.resolve().parent.parent
    artifact = Artifact(place.parent.name, place.name, place)
    overrides = artifact.provenance.get("overrides")
    if not isinstance(overrides, list):
        raise ConfigError(f"{folder} does not say which model it was made from; {GIVE}")
    words = [str(w) for w in overrides if setting(str(w))[1].split(".")[0] in CHOOSE]
    try:
        found = _model(words, config)
        same = recipe(found) == artifact.manifest["recipe"]["stage"].get("model")
    except DirotqError as error:
        raise ConfigError(
            f"the model that {artifact} was made from is not where it was ({error}); {GIVE}"
        ) from error
    if not same:
        raise ConfigError(
            f"{' '.join(words) or 'the default model'} is not what {artifact} was made from: it "
            f"changed since; {GIVE}"
        )
    return found


def _refuse_another(folder: Path, named: Any, given: str) -> None:
    """Raise ConfigError unless both are pipelines of one class."""
    around = named.folder(weights=False, complete=False)
    mine, theirs = (read_json(root / INDEX).get("_class_name") for root in (folder, around))
    if mine != theirs:
        raise ConfigError(
            f"--compare {given} is a {theirs}, and {folder} was packed from a {mine}: give the "
            "16-bit model that it was made from"
        )


def psnr(made: Any, want: Any) -> float:
    """Return the PSNR in dB of what two pipelines made as tensors, of a video that of all frames.

    Raises ConfigError if their sizes differ.
    """
    from dirotq.evaluate.fidelity import psnr

    one, other = (_tensor(result).float().cpu() for result in (made, want))
    if one.shape != other.shape:
        raise ConfigError(
            f"the packed model makes {tuple(one.shape)} and the original {tuple(other.shape)}; "
            "they are not of one model"
        )
    return float(psnr(one, other))


def sound_ratio(made: Any, want: Any) -> float | None:
    """Return the SNR in dB of one sound to the other; None where the pipelines make none.

    Raises ConfigError if one of both makes none, or their lengths differ.
    """
    from dirotq.evaluate.sounds import snr
    from dirotq.sources.sound import sound_of

    one, other = sound_of(made), sound_of(want)
    if one is None or other is None or one.shape != other.shape:
        if one is other:
            return None
        shapes = [None if sound is None else tuple(sound.shape) for sound in (one, other)]
        raise ConfigError(
            f"the packed model's sound is {shapes[0]} and the original's {shapes[1]}; they are not "
            "of one model"
        )
    return float(snr(one, other))


def as_pictures(made: Any) -> Any:
    """Return what a pipeline made as tensors, the images or frames of its first result as PIL."""
    from PIL import Image

    first = _tensor(made)[0].float().cpu()
    frames = first if first.dim() == 4 else first[None]
    arrays = (frames * 255).round().byte().movedim(1, -1).numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    if first.dim() == 3:
        return SimpleNamespace(images=pictures)
    return SimpleNamespace(frames=[pictures])


def _tensor(made: Any) -> Any:
    return made.images if hasattr(made, "images") else made.frames


def _model(words: list[str], config: str) -> Any:
    found = make(compose_config(words, config).model, "model")
    if not hasattr(found, "pipeline"):
        raise ConfigError(f"{' '.join(words)} is no diffusers pipeline; {GIVE}")
    return found
