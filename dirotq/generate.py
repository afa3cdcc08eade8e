"""``dirotq generate``: an image or video from a packed model, by the loader everybody uses."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from dirotq.errors import ArtifactError, ConfigError
from dirotq.models.pipeline_images import PICTURES, as_taken, pictures_needed
from dirotq.original import as_pictures, original_of, psnr, sound_ratio
from dirotq.pipeline.housekeeping import store_option
from dirotq.pipeline.machine import refuse_device
from dirotq.pipeline.manifest import read_json
from dirotq.pipeline.sizes import parse_vram
from dirotq.pipeline.store import ArtifactStore
from dirotq.progress import begin, told
from dirotq.sources.calls import arguments, pipeline_class, refuse_call
from dirotq.sources.prompt_files import open_picture
from dirotq.sources.prompts import resolve

STILL, MOVING = "image.png", "video.webp"
"""Where a result goes unless told otherwise."""
ARTIFACT = re.compile(r"[a-z_]+(/[0-9a-f]*)?|[0-9a-f]+")
"""What names one; anything else is a path."""
FPS = 16
SEEDS = 1 << 64
"""torch takes seeds below this one."""


def add_generate(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `generate`."""
    parser = add(
        _generate, "one image from a packed model",
        'pack/1f3a --prompt "a small red star" --out star.png',
        'FOLDER --prompt "a hat" --image in.png --mask hat.png --seed 7',
        'pack/1f3a --prompt "a small red star" --compare',
    )  # fmt: skip
    parser.add_argument("model", help="a packed folder, or an artifact such as pack/1f3a")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the image shows")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {STILL}, or {MOVING}")
    parser.add_argument("--steps", type=int, help="default: generation.json of the model")
    parser.add_argument("--image", metavar="FILE", help="what an editing model starts from")
    parser.add_argument("--mask", metavar="FILE", help="white where a filling model paints")
    parser.add_argument(
        "--compare", nargs="?", const="", metavar="ORIGINAL",
        help="make it with the 16-bit model too, and tell the PSNR; default: the model that the "
        "artifact was made from",
    )  # fmt: skip
    parser.add_argument("--fps", type=int, help=f"of a video (default: {FPS})")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--vram", metavar="SIZE", help="GPU memory to stay within, such as 16GB")
    store_option(parser)


def _generate(options: argparse.Namespace) -> int:
    """Load a packed model and write one image, or one video as an animated image.

    The sound of a video lies beside it, as a WAV file.

    With --compare, NAME-original lies beside it afterwards: the 16-bit model's, of the same prompt
    and noise.
    """
    _refuse_options(options)
    begin("loading torch and the model")
    folder = model_folder(options.model, options.store)
    defaults = folder / "generation.json"
    settings = dict(read_json(defaults)) if defaults.is_file() else {}
    if options.steps is not None:
        settings["num_inference_steps"] = options.steps
    images = _images(options)
    moving = _refuse_model(folder, settings, images)
    if options.fps is not None and not moving:
        raise ConfigError("--fps is about a video, and this model makes images: leave it out")
    fps = options.fps or FPS
    out = options.out or Path(MOVING if moving else STILL)
    _refuse_place(out, moving=moving)

    beside = out.with_name(f"{out.stem}-original{out.suffix}")
    if options.compare is not None:
        _refuse_place(beside, moving=moving)
    # With torch, which takes seconds: not before the options are right.
    from dirotq.loading import load

    original = None
    if options.compare is not None:
        original = original_of(folder, options.compare, options.config)
        settings["output_type"] = "pt"  # not rounded to 8 bits before it is compared
    elif moving:
        settings["output_type"] = "pil"
    arguments = f"those of {defaults}, --prompt, --steps, --image and --mask"
    pipeline = load(folder, device=options.device, vram=options.vram)
    made = _called(pipeline, options, images | settings, arguments)
    print(_write(made if original is None else as_pictures(made), out, fps))
    _write_sound(made, pipeline, out)
    if original is None:
        return 0
    del pipeline  # one of both is in memory
    pipeline = _open_original(original, options.device)
    want = _called(pipeline, options, images | settings, arguments)
    print(_write(as_pictures(want), beside, fps))
    _write_sound(want, pipeline, beside)
    print(f"PSNR {psnr(made, want):.1f} dB")
    if (ratio := sound_ratio(made, want)) is not None:
        print(f"sound: SNR {ratio:.1f} dB")
    return 0


def _called(pipeline: Any, options: argparse.Namespace, call: Mapping[str, Any], known: str) -> Any:
    """Call a pipeline; ConfigError if it refuses its arguments, which are ``known``."""
    import torch

    # The noise comes from the CPU's generator, so a seed means the same image on every device.
    noise = torch.Generator("cpu").manual_seed(options.seed)
    pictures = {n: as_taken(type(pipeline), call[n]) for n in PICTURES if n in call}
    try:
        with told("dirotq.runtime"):  # a first image waits for the compiler
            return pipeline(prompt=options.prompt, generator=noise, **{**call, **pictures})
    except (ValueError, TypeError) as error:  # how pipelines refuse their arguments
        raise ConfigError(
            f"{type(pipeline).__name__} refuses this call: {error}. Its arguments are {known}"
        ) from error


def _open_original(model: Any, device: str) -> Any:
    """Open the 16-bit pipeline where and in what the packed one ran."""
    from dirotq.device import compute_dtype, pick_device, release

    target = pick_device(device)
    release(target)  # the packed one
    return model.pipeline(compute_dtype(target), target)


def model_folder(name: str, store: str) -> Path:
    """Find the diffusers folder ``name``: a path, or an artifact of the store that holds one.

    Raises ConfigError for a folder that holds no pipeline, ArtifactError for an unknown artifact.
    """
    if (folder := resolve(name)).is_dir():
        for inside in (folder, folder / "data" / "model"):  # an artifact's own folder is as good
            if (inside / "model_index.json").is_file():
                return inside
        raise ConfigError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    if folder.exists() or not ARTIFACT.fullmatch(name):
        found = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            f"{name} {found}; give a packed folder, or an artifact of the store such as pack/1f3a"
        )
    artifact = ArtifactStore(store).find(name)
    held = [file for file in artifact.manifest["files"] if file.endswith("model_index.json")]
    if not held:
        raise ArtifactError(f"{artifact} holds no model_index.json; name an artifact of pack")
    artifact.check()
    return artifact.data / Path(min(held, key=len)).parent


def _refuse_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for what no model can do, before one is loaded."""
    if not options.prompt.strip():
        raise ConfigError("--prompt is empty; say what the image shows")
    if not 0 <= options.seed < SEEDS:
        raise ConfigError(f"--seed {options.seed}: use a whole number from 0 to {SEEDS - 1}")
    for name in ("steps", "fps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value}: use a whole number from 1 on")
    refuse_device(options.device, "--device")
    if options.vram is not None:
        parse_vram(options.vram, "--vram")
        if options.compare is not None:
            raise ConfigError(
                "--vram and --compare: the limit is for a packed model, and the 16-bit one would "
                "not stay within it; leave one of them out"
            )


def _images(options: argparse.Namespace) -> dict[str, Any]:
    """Open what an editing pipeline starts from, by the names of its arguments."""
    found = {}
    for name, option in (("image", "image"), ("mask_image", "mask")):
        if (file := getattr(options, option)) is None:
            continue
        try:
            found[name] = open_picture(file)
        except ConfigError as error:
            raise ConfigError(f"--{option} {error}") from error
    return found


def _refuse_model(folder: Path, settings: Mapping[str, Any], images: Mapping[str, Any]) -> bool:
    """Hold the call against the model's pipeline class; whether it makes videos.

    Raises ConfigError.
    """
    cls = pipeline_class(read_json(folder / "model_index.json"))
    if cls is None:
        return False  # the loader says what is wrong with it
    refuse_call(cls, settings, str(folder / "generation.json"))
    known = arguments(cls)
    options = {"image": "--image FILE", "mask_image": "--mask FILE"}
    for name, option in options.items():
        if name in images and name not in known:
            raise ConfigError(f"{option}: {cls.__name__} starts from no {name}; leave it out")
        if name in pictures_needed(cls) and name not in images:
            raise ConfigError(
                f"{cls.__name__} starts from an image that it is given: {option} is missing (it "
                f"takes {' and '.join(options[n] for n in options if n in known)})"
            )
    return "num_frames" in known


def _refuse_place(out: Path, *, moving: bool) -> None:
    """Raise ConfigError unless an image of that name can be written; makes its folder."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a file in it")
    if not _savable(out.suffix, moving=moving):
        found = f"the suffix {out.suffix}" if out.suffix else "no suffix"
        if moving:
            raise ConfigError(
                f"--out {out} has {found}, and a video is written as an animated image: use .webp, "
                ".gif or .png; for .mp4 call the pipeline in Python: dirotq.load(FOLDER), then "
                "diffusers.utils.export_to_video(pipe(...).frames[0], 'video.mp4')"
            )
        raise ConfigError(
            f"--out {out} has {found}, and the format of the image follows from it: use .png, "
            ".jpg, .webp or another that Pillow can write"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: the folder {out.parent} can't be made ({error.strerror}); give a file "
            "in a folder of yours"
        ) from error
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: permission denied; give a file in a folder of yours")


def _savable(suffix: str, *, moving: bool) -> bool:
    """Tell whether Pillow can write colours, several images if ``moving``, in this format here.

    Tried out: some formats take black and white only, others a library that isn't there.
    """
    form = Image.registered_extensions().get(suffix.lower())
    if form is None or form not in (Image.SAVE_ALL if moving else Image.SAVE) or form == "PDF":
        return False
    sample = Image.new("RGB", (16, 16))
    try:
        more: dict[str, Any] = {"save_all": True, "append_images": [sample]} if moving else {}
        sample.save(BytesIO(), form, **more)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _write(made: Any, out: Path, fps: int) -> Path:
    """Save the first image or video; under another suffix rather than not at all."""
    if hasattr(made, "images"):
        _opaque(made.images[0], out).save(out)
        return out
    first, *others = made.frames[0]
    if not _savable(out.suffix, moving=True):
        out = out.with_suffix(Path(MOVING).suffix)
    first.save(out, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return out


def _write_sound(made: Any, pipeline: Any, out: Path) -> None:
    """Write the sound of a video, where its pipeline makes one, beside it."""
    from dirotq.sources.sound import sampling_rate, sound_of, write_sound  # slow: torch

    if (sound := sound_of(made)) is not None:
        file = out.with_suffix(".wav")
        write_sound(file, sound[0], sampling_rate(pipeline))
        print(file)


def _opaque(image: Image.Image, out: Path) -> Image.Image:
    """Return a transparent image on white where the format of ``out`` takes colours alone."""
    if image.mode != "RGBA":
        return image
    try:
        image.save(BytesIO(), Image.registered_extensions()[out.suffix.lower()])
    except OSError:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image
