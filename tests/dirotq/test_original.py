"""`dirotq generate --compare`, on the tiny pipeline."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dirotq.cli import main
from dirotq.errors import ConfigError
from dirotq.original import as_pictures, original_of, psnr

CONF = "dirotq.conf"


@pytest.fixture
def artifact(finished, tmp_path):
    """``artifact(*overrides)``: a copy of the pack artifact that says it was made with these."""

    def make(*overrides):
        place = shutil.copytree(
            finished["pack"].path, tmp_path / "pack" / finished["pack"].path.name
        )
        provenance = json.loads((place / "provenance.json").read_text())
        text = json.dumps(provenance | {"overrides": list(overrides)})
        (place / "provenance.json").write_text(text)
        return place / "data" / "model"

    return make


@pytest.fixture
def generated(capsys, tmp_path):
    """``generated(folder, *words)``: status, lines of stdout, stderr."""

    def call(*words):
        with pytest.raises(SystemExit) as left:
            main(["generate", *map(str, words), "--prompt", "two small blue stars", "--seed", "3",
                  "--device", "cpu", "--out", str(tmp_path / "star.png")])  # fmt: skip
        out, err = capsys.readouterr()
        return left.value.code, out.splitlines(), err

    return call


def test_the_pair_and_its_psnr(generated, artifact, folder, tmp_path):
    packed = artifact(f"model={folder}", "rank.r=16", "store=elsewhere")
    status, lines, err = generated(packed, "--compare")
    assert status == 0, err
    assert lines[:2] == [str(tmp_path / "star.png"), str(tmp_path / "star-original.png")]
    told = float(lines[2].removeprefix("PSNR ").removesuffix(" dB"))
    one, other = (
        torch.frombuffer(bytearray(Image.open(line).tobytes()), dtype=torch.uint8).float() / 255
        for line in lines[:2]
    )
    # Both files are rounded to 8 bits, what is told is not.
    rounding = 2 / (12 * 255**2)
    assert (one - other).square().mean() == pytest.approx(10 ** (-told / 10) + rounding, rel=0.3)
    assert 15 < told < 100
    compared = Image.open(lines[0]).tobytes()
    assert generated(packed)[1] == lines[:1]
    assert Image.open(lines[0]).tobytes() == compared
    again = generated(packed, "--compare", folder)
    assert again[1] == lines


def test_the_packed_image_is_there_before_the_other_is_made(
    generated, artifact, folder, tmp_path, monkeypatch
):
    def fails(*_):
        raise ConfigError("no room for it")

    monkeypatch.setattr("dirotq.generate._open_original", fails)
    packed = artifact(f"model={folder}")
    status, lines, err = generated(packed, "--compare")
    assert status != 0 and "no room for it" in err
    assert lines == [str(tmp_path / "star.png")]
    assert Image.open(lines[0]).size > (1, 1)


def test_the_model_has_to_be_the_one_that_was_packed(artifact, folder, own_folder):
    packed = artifact(f"model={own_folder}")
    assert original_of(packed, "", CONF).path == str(own_folder)
    config = own_folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("1000", "999"))
    with pytest.raises(ConfigError, match=r"is not what pack/\w+ was made from: it changed since"):
        original_of(packed, "", CONF)
    assert original_of(packed, str(own_folder), CONF).path == str(own_folder)
    with pytest.raises(ConfigError, match=r"tiny_pixart is a PixArtSigmaPipeline.*a FluxPipeline"):
        original_of(packed, "tiny_pixart", CONF)
    shutil.rmtree(own_folder)
    with pytest.raises(ConfigError, match=r"not where it was.*--compare ORIGINAL"):
        original_of(packed, "", CONF)


def test_settings_of_the_call_count(artifact, folder):
    packed = artifact("squares=x", f"model={folder}", "+model.call.height=64")
    with pytest.raises(ConfigError, match="is not what"):  # it was packed with 32
        original_of(packed, "", CONF)


def test_a_folder_that_says_nothing_of_its_origin(packed_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(packed_folder.parent)
    for place in (packed_folder, packed_folder.relative_to(packed_folder.parent)):
        with pytest.raises(ConfigError, match=r"does not say which model.*--compare ORIGINAL"):
            original_of(place, "", CONF)
    with pytest.raises(ConfigError, match="no diffusers pipeline"):
        original_of(packed_folder, "large", "toyline.conf")


def test_psnr_and_pictures_of_images_and_videos():
    image = torch.zeros(1, 3, 8, 8)
    made, want = SimpleNamespace(images=image), SimpleNamespace(images=image + 0.1)
    assert psnr(made, want) == pytest.approx(20, abs=1e-3)
    (picture,) = as_pictures(want).images
    assert (picture.size, picture.getpixel((0, 0))) == ((8, 8), (26, 26, 26))
    film = torch.zeros(1, 2, 3, 8, 8)
    half = film.clone()
    half[:, 0] += 0.1
    one, other = SimpleNamespace(frames=film), SimpleNamespace(frames=half)
    assert psnr(one, other) == pytest.approx(20 + 10 * math.log10(2), abs=1e-3)
    assert [frame.getpixel((0, 0))[0] for frame in as_pictures(other).frames[0]] == [26, 0]
    with pytest.raises(ConfigError, match="not of one model"):
        psnr(made, one)
