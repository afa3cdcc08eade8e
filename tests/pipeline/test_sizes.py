import pytest

from dirotq.errors import ConfigError
from dirotq.pipeline.sizes import parse_bytes, parse_vram


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24gb", 24e9), (" 1.5 TB ", 15e11), ("500M", 5e8), (7, 7), ("7B", 7)],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_bytes(text, "pack.shard") == size


@pytest.mark.parametrize("text", ["24 GiB", "", "much", -1, 0, "-2GB", "1e9", ["24GB"], None])
def test_what_is_no_size_names_its_setting(text):
    with pytest.raises(ConfigError, match=r"^pack\.shard: .* is no size in bytes; write"):
        parse_bytes(text, "pack.shard")


def test_a_unit_that_was_forgotten():
    with pytest.raises(ConfigError, match=r'^vram: 24 is 24 bytes.*as in "24GB"'):
        parse_vram(24, "vram")
    assert parse_vram("1MB", "vram") == parse_vram(10**6, "vram") == 10**6
    with pytest.raises(ConfigError, match="999999 bytes"):
        parse_vram(999_999, "vram")
