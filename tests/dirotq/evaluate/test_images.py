import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dirotq.errors import ArtifactError
from dirotq.evaluate.images import (
    ImageWriter,
    has_images,
    made_in,
    made_on,
    read_images,
    read_seconds,
    read_sounds,
    typical_seconds,
)


def _images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_read_is_what_was_written_to_half_a_step(tmp_path):
    images = _images(5, 3, 8, 6)
    writer = ImageWriter(tmp_path, "packed", 5, device="CPU")
    writer.write(0, images[:2], 1.5)
    writer.write(2, images[2:], 2.0)
    got = read_images(tmp_path, "packed", slice(None))
    assert got.dtype == torch.float32 and got.shape == images.shape
    assert (got - images).abs().max() <= 0.5 / 65535 + 1e-7
    assert read_seconds(tmp_path, "packed").tolist() == [1.5, 1.5, 2.0, 2.0, 2.0]
    assert made_on(tmp_path, "packed") == "CPU"
    assert has_images(tmp_path, "packed") and not has_images(tmp_path, "floor")


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8))
def test_steps_round_to_nearest_and_the_ends_are_exact(tmp_path, values):
    images = torch.tensor(values).expand(1, 3, 1, len(values))
    name = f"at{len(list(tmp_path.iterdir()))}"
    ImageWriter(tmp_path, name, 1).write(0, images, 1.0)
    got = read_images(tmp_path, name)[0, 0, 0].double()
    assert all(abs(g - v) <= 0.5 / 65535 + 1e-7 for g, v in zip(got, values))
    assert all(g == v for g, v in zip(got, values) if v in (0.0, 1.0))


def test_who_made_them_and_in_which_precision(tmp_path):
    ImageWriter(tmp_path, "packed", 3, device="A", dtype="float32").write(
        0, _images(2, 3, 4, 4), 9.0
    )
    moved = ImageWriter(tmp_path, "packed", 3, device="B", dtype="float32")
    assert typical_seconds(tmp_path, "packed") == 9
    moved.write(1, _images(2, 3, 4, 4), 2.0)
    assert made_on(tmp_path, "packed") == "A; B"
    assert made_in(tmp_path, "packed") == "float32"
    assert typical_seconds(tmp_path, "packed") == 2
    with pytest.raises(ArtifactError, match=r"begun in float32.*dtype=float32"):
        ImageWriter(tmp_path, "packed", 3, device="B", dtype="bfloat16")


def test_sounds_lie_beside_their_videos(tmp_path):
    videos, sounds = _images(3, 2, 3, 4, 4), _images(3, 2, 18) - 0.5
    sounds[1] = 0  # silence is no sound that is missing
    writer = ImageWriter(tmp_path, "packed", 3)
    for start in range(3):
        writer.write(start, videos[start : start + 1], 1.0, sounds[start : start + 1])
    assert torch.equal(read_sounds(tmp_path, "packed", slice(1, 3)), sounds[1:])
    assert read_sounds(tmp_path, "original", slice(0, 3)) is None
    (tmp_path / "packed_sound" / "c" / "2" / "0" / "0").unlink()
    with pytest.raises(ArtifactError, match="a sound of 'packed' is gone"):
        read_sounds(tmp_path, "packed", slice(0, 3))


def test_videos_and_chosen_indices_keep_their_order(tmp_path):
    videos = _images(4, 2, 3, 4, 4)
    ImageWriter(tmp_path, "original", 4).write(0, videos, 1.0)
    got = read_images(tmp_path, "original", [3, 0])
    torch.testing.assert_close(got, videos[[3, 0]], atol=1e-5, rtol=0)
    assert read_images(tmp_path, "original", slice(1, 3)).shape == (2, 2, 3, 4, 4)


def test_a_second_writer_goes_on_where_the_first_stopped(tmp_path):
    images = _images(5, 3, 4, 4)
    first = ImageWriter(tmp_path, "packed", 5)
    assert first.missing(2) == [range(0, 2), range(2, 4), range(4, 5)]
    first.write(2, images[2:4], 1.0)
    second = ImageWriter(tmp_path, "packed", 5)
    assert second.missing(2) == [range(0, 2), range(4, 5)]
    assert second.missing(3) == [range(0, 3), range(3, 5)]
    for batch in second.missing(2):
        second.write(batch.start, images[batch.start : batch.stop], 1.0)
    assert not second.missing(2)
    torch.testing.assert_close(read_images(tmp_path, "packed"), images, atol=1e-5, rtol=0)


def test_two_names_share_a_tree(tmp_path):
    for name, seed in (("original", 1), ("floor", 2)):
        ImageWriter(tmp_path, name, 1).write(0, _images(1, 3, 4, 4, seed=seed), 1.0)
    a, b = (read_images(tmp_path, name) for name in ("original", "floor"))
    assert not torch.equal(a, b)


def test_black_images_leave_a_chunk(tmp_path):
    ImageWriter(tmp_path, "packed", 2).write(0, torch.zeros(2, 3, 4, 4), 1.0)
    array = zarr.open_group(tmp_path, mode="r")["packed"]
    assert array.nchunks_initialized == 2
    assert not read_images(tmp_path, "packed").any()


def test_an_unfinished_image_is_an_error_not_black(tmp_path):
    writer = ImageWriter(tmp_path, "packed", 3)
    writer.write(0, _images(2, 3, 4, 4), 1.0)
    assert read_images(tmp_path, "packed", [0, 1]).shape[0] == 2
    with pytest.raises(ArtifactError, match=r"image 2 of 'packed' was never finished"):
        read_images(tmp_path, "packed")


def test_pixels_without_their_marker_do_not_count(tmp_path):
    """A kill between an image and its time leaves the image to be made again."""
    writer = ImageWriter(tmp_path, "packed", 1)
    writer.write(0, _images(1, 3, 4, 4), 1.0)
    zarr.open_group(tmp_path, mode="r+")["packed_seconds"][0] = np.nan
    assert ImageWriter(tmp_path, "packed", 1).missing(1) == [range(0, 1)]


def test_a_flipped_bit_is_found(tmp_path):
    ImageWriter(tmp_path, "packed", 1).write(0, _images(1, 3, 16, 16), 1.0)
    (chunk,) = (p for p in (tmp_path / "packed" / "c").rglob("*") if p.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"image 0 of 'packed' is damaged.*checksum"):
        read_images(tmp_path, "packed")


@pytest.mark.parametrize("chosen", [[1], slice(None)])
def test_a_chunk_that_is_gone_is_an_error_not_black(tmp_path, chosen):
    ImageWriter(tmp_path, "packed", 2).write(0, _images(2, 3, 4, 4), 1.0)
    (tmp_path / "packed" / "c" / "1" / "0" / "0" / "0").unlink()
    assert read_images(tmp_path, "packed", [0]).any()
    with pytest.raises(ArtifactError, match="image 1 of 'packed' is gone"):
        read_images(tmp_path, "packed", chosen)


@pytest.mark.parametrize("content", [b"", b"half"])
def test_a_torn_time_is_an_error_with_its_name(tmp_path, content):
    ImageWriter(tmp_path, "packed", 1).write(0, _images(1, 3, 4, 4), 1.0)
    (tmp_path / "packed_seconds" / "c" / "0").write_bytes(content)
    with pytest.raises(ArtifactError, match="a time of 'packed' is damaged"):
        read_seconds(tmp_path, "packed")


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_brightness_out_of_range_is_refused(tmp_path, value):
    writer = ImageWriter(tmp_path, "packed", 1)
    with pytest.raises(ValueError, match="not in"):
        writer.write(0, torch.full((1, 3, 4, 4), value), 1.0)
    assert writer.missing(1)


def test_names_and_places_that_are_not_there(tmp_path):
    writer = ImageWriter(tmp_path, "packed", 1)
    with pytest.raises(ValueError, match="exceed"):
        writer.write(1, _images(1, 3, 4, 4), 1.0)
    with pytest.raises(ArtifactError, match="no images 'floor'"):
        read_images(tmp_path, "floor")
