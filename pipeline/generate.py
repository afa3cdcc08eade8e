"""``dirotq generate``: one image from a packed model, through the loader everybody uses."""

import argparse
import json
from pathlib import Path
from typing import Any

import dirotq
from dirotq.errors import ArtifactError, ConfigError
from dirotq.pipeline.housekeeping import store_option
from dirotq.pipeline.store import ArtifactStore

__all__ = ["command", "model_folder"]


def command(args: list[str]) -> int:
    """Load a packed model and write one image."""
    parser = argparse.ArgumentParser(prog="dirotq generate", description=command.__doc__)
    parser.add_argument("model", help="a packed folder, or an artifact such as pack/1f3a")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("image.png"), metavar="FILE")
    parser.add_argument("--steps", type=int, help="default: generation.json of the model")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: %(default)s)")
    store_option(parser)
    options = parser.parse_args(args)
    folder = model_folder(options.model, options.store)
    settings = _settings(folder)
    if options.steps is not None:
        settings["num_inference_steps"] = options.steps

    import torch  # the other verbs do without

    pipeline = dirotq.load(folder, device=options.device)
    # The noise comes from the CPU's generator, so a seed means the same image on every device.
    noise = torch.Generator("cpu").manual_seed(options.seed)
    image = pipeline(options.prompt, generator=noise, **settings).images[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    image.save(options.out)
    print(options.out)
    return 0


def model_folder(name: str, store: str) -> Path:
    """The diffusers folder called ``name``: a path, or an artifact of the store that holds one.

    Raises ConfigError for a folder that holds no pipeline, ArtifactError for an unknown artifact.
    """
    if (folder := Path(name)).is_dir():
        if (folder / "model_index.json").is_file():
            return folder
        raise ConfigError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    artifact = ArtifactStore(store).find(name)
    held = [file for file in artifact.manifest["files"] if file.endswith("model_index.json")]
    if not held:
        raise ArtifactError(f"{artifact} holds no model_index.json; name an artifact of pack")
    artifact.check()
    return artifact.data / Path(min(held, key=len)).parent


def _settings(folder: Path) -> dict[str, Any]:
    """The call's defaults that the model brings with it; none if it brings none."""
    path = folder / "generation.json"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return settings
