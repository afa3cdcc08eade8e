"""What stands in a prompt file is what is read, or the row is named."""

import json
import os
import struct
import zlib

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dirotq.errors import ConfigError
from dirotq.sources import prompt_files
from dirotq.sources.prompt_files import MISSING, ORIENTATION, open_picture, rows, treatment
from dirotq.sources.prompts import SEEDS, PromptSet, shortly


def prompts(path, start=0, count=1, **more):
    return PromptSet(path=str(path), start=start, count=count, **more)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


# Paths are paths


@pytest.mark.parametrize("name", ["set[1].jsonl", "set*.jsonl", "s?t.jsonl", "{a,b}.jsonl"])
def test_a_path_is_no_pattern(write, name):
    for other in ("set1.jsonl", "set-and-more.jsonl", "sxt.jsonl", "a.jsonl"):
        write(other, '{"prompt": "another"}\n')
    (found,) = prompts(write(name, '{"prompt": "this one"}\n')).load()
    assert found.text == "this one"


def test_a_folder_is_no_pattern(tmp_path):
    (tmp_path / "br [x]").mkdir()
    file = tmp_path / "br [x]" / "#a.csv"
    file.write_text("prompt\nthis one\n")
    assert prompts(file).load()[0].text == "this one"


def test_a_local_file_needs_no_cache(write, tmp_path, monkeypatch):
    """Nothing of `datasets`, which locks a folder below HF_HOME to read a local file."""
    monkeypatch.setattr(datasets, "load_dataset", None)
    for name, content in (("a.jsonl", '{"prompt": "a"}'), ("a.csv", "prompt\na\n"), ("a.txt", "a")):
        assert prompts(write(name, content)).load()[0].text == "a"


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "folder.jsonl"):
        with pytest.raises(ConfigError, match=rf"{name} is no regular file"):
            prompts(tmp_path / name).load()
    (tmp_path / "broken.jsonl").symlink_to("nowhere")
    for path in (tmp_path / "broken.jsonl", "x" * 5000, "a\0b.jsonl"):
        with pytest.raises(ConfigError, match=r"does not exist|can't be read \(File name too long"):
            prompts(path).load()
    with pytest.raises(ConfigError, match="no such home folder"):
        prompts("~nobody-of-this-name/x.jsonl").load()


@pytest.mark.parametrize(
    "fields", [{"start": -1}, {"start": 1.5}, {"count": True}, {"count": 2**63}, {"count": "2"},
               {"path": 5}, {"column": None}],
)  # fmt: skip
def test_fields_are_checked(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=f"prompts: {name}="):
        PromptSet(**{"path": "x.jsonl", "start": 0, "count": 1, "column": "prompt"} | fields)


# Seeds


def seeds_of(write, name, *seeds):
    if name.endswith("csv"):
        content = "prompt,seed\n" + "".join(f"a,{seed}\n" for seed in seeds)
    else:
        content = "".join(f'{{"prompt": "a", "seed": {seed}}}\n' for seed in seeds)
    return [p.seed for p in prompts(write(name, content), count=len(seeds)).load()]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_seed_is_the_number_that_is_written(write, name):
    given = [0, 9007199254740993, 12345678901234567890, SEEDS[0], SEEDS[1], -1]
    assert seeds_of(write, name, *given) == given
    assert seeds_of(write, name, "7.0") == [7]


def test_a_missing_seed_changes_no_other(write):
    assert seeds_of(write, "a.csv", "9007199254740993", "", "NaN", "007") == [
        9007199254740993, 1, 2, 7,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "seed",
    ["18446744073709551616", "-9223372036854775809", "9007199254740993.0", "1e20", "1.5", "NaN",
     "Infinity", "1e400", "true", '"7"', "[1]", "{}"],
)  # fmt: skip
def test_a_seed_that_is_none_is_refused(write, seed):
    with pytest.raises(
        ConfigError,
        match=r"row 1: the seed .* is no whole number from -9223372036854775808 to 1844",
    ):
        seeds_of(write, "a.jsonl", seed)


@pytest.mark.parametrize("seed", ["1.5", "inf", "1e3", "True", "x", "18446744073709551616", "１"])
def test_a_cell_that_is_no_seed_is_refused(write, seed):
    with pytest.raises(ConfigError, match=r"row 1: the seed .* is no whole number"):
        seeds_of(write, "a.csv", seed)


@given(st.integers(*SEEDS))
def test_seeds_of_parquet(tmp_path_factory, seed):
    file = tmp_path_factory.mktemp("p") / "a.parquet"
    kind = pyarrow.uint64() if seed >= 0 else pyarrow.int64()
    table = {"prompt": ["a"], "seed": pyarrow.array([seed], kind)}
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    assert [p.seed for p in prompts(file).load()] == [seed]


# What a row says


def test_attributes_are_as_written(write):
    said = [{"x": [{"y": 1}, {"z": None}]}, {"w": 2}, "no mapping", None]
    listed = [{"prompt": "a", "attributes": attributes} for attributes in said]
    file = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in listed))
    assert [p.attributes for p in prompts(file, count=4).load()] == [*said[:2], None, None]


def test_blank_lines_are_no_rows(write):
    assert [p.seed for p in prompts(write("a.jsonl", '{"prompt": "a"}\n\n \n{"prompt": "b"}'),
                                    count=2).load()] == [0, 1]  # fmt: skip
    csv = write("a.csv", 'prompt\r\n"a, ""x""\nb"\r\n\r\n   \r\nc\r\n')
    assert [p.text for p in prompts(csv, count=2).load()] == ['a, "x"\nb', "c"]


def test_a_byte_order_mark_is_no_text(write):
    for name, content in (("a.txt", "a"), ("a.csv", "prompt\na"), ("a.jsonl", '{"prompt": "a"}'),
                          ("a.json", '["a"]'), ("a.yaml", "- a")):  # fmt: skip
        assert prompts(write(name, b"\xef\xbb\xbf" + content.encode())).load()[0].text == "a"


def test_a_json_array_in_a_jsonl_file(write):
    file = write("a.jsonl", '[\n {"prompt": "a"},\n {"prompt": "b"}\n]\n')
    assert [p.text for p in prompts(file, start=1).load()] == ["b"]


def test_a_large_file_is_read_as_far_as_it_is_used(write):
    file = write("a.jsonl", '{"prompt": "a"}\n' * 3 + "no json, and never read")
    assert len(prompts(file, count=3).load()) == 3
    with pytest.raises(ConfigError, match=r"can't be read \(row 4: "):
        prompts(file, count=4).load()


def test_a_line_without_an_end(write, monkeypatch):
    monkeypatch.setattr("dirotq.sources.prompt_files.LINE", 100)
    monkeypatch.setattr("dirotq.sources.prompt_files.WHOLE", 100)
    for name in ("a.txt", "a.jsonl", "a.csv"):
        with pytest.raises(ConfigError, match="a line has more than 100 characters"):
            prompts(write(name, "x" * 101)).load()
    with pytest.raises(ConfigError, match=r"has 101 bytes.* write it as \.jsonl"):
        prompts(write("a.json", "x" * 101)).load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "row 1: the key 'prompt' stands twice"),
        ("a.jsonl", '{"prompt": "a", "seed": ' + "1" * 5000 + "}", "row 1: Exceeds the limit"),
        ("a.jsonl", '{"prompt": ' + "[" * 10**5, "row 1: it is nested too deeply"),
        ("a.json", "[" * 10**5, "nested too deeply"),
        ("a.yaml", "[" * 10**4, "nested too deeply"),
        ("a.jsonl", '{"prompt": "\\ud800"}', r"row 1: the text holds '\\ud800'.*UTF-8"),
        ("a.jsonl", '{"prompt": "a\\u0000"}', r"row 1: the text holds '\\x00'"),
        ("a.jsonl", "prompt: ü".encode("latin-1"), "can't decode byte 0xfc"),
        ("a.txt", "ü".encode("utf-16"), "can't decode byte"),
        ("a.csv", "prompt,x,prompt\na,b,c\n", "the column 'prompt' stands twice"),
        ("a.csv", "prompt,seed\na, b,1\n", "row 1: 3 cells below a header of 2"),
        ("a.csv", 'prompt\n"a\nb\n', "unexpected end of data"),
        ("a.csv", "prompt\n" + "x" * 200_000, "field larger than field limit"),
        ("a.csv", "prompt\nNone\n", "row 1: no text under 'prompt', but None"),
        ("a.csv", "", "holds no prompts"),
        ("a.csv", "a cat\na dog\n", "no column 'prompt', there are .'a cat'"),
        ("a.parquet", b"PAR1" + b"\0" * 50 + b"PAR1", "can't be read"),
        ("a.parquet", b"", "can't be read"),
        ("a.jsonl.gz", b"\x1f\x8b", r"not from \.gz"),
        ("a.yaml", "x: a\nx: b\n", "the key 'x' stands twice"),
        ("a.yaml", "!!set {a, b}", "neither a list nor a mapping"),
        ("a.yaml", "- !!int ''\n", "can't be read"),
        ("a.yaml", "- !!bool maybe\n", "can't be read"),
        ("a.yaml", "- !!timestamp x\n", "can't be read"),
        ("a.yaml", "- !!python/object:os.system x\n", "could not determine a constructor"),
        ("a.yaml", "- 0x" + "f" * 9000, "row 1: no text under 'prompt', but a int too long"),
        ("a.json", "0", "neither a list nor a mapping"),
    ],
)  # fmt: skip
def test_what_is_refused(write, name, content, message):
    with pytest.raises(ConfigError, match=message):
        prompts(write(name, content)).load()


def test_aliases_do_not_explode(write):
    nested = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    with pytest.raises(ConfigError, match="no text under"):
        prompts(write("a.yaml", "a0: &a0 [x]\n" + nested + "b: *a29\n"), start=29).load()
    merged = "".join(
        f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    file = write("a.yaml", "a0: &a0 {prompt: x}\n" + merged)
    assert [p.text for p in prompts(file, count=30).load()] == ["x"] * 30
    honest = "a: &a {prompt: x, seed: 1}\nb: {<<: *a, seed: 2}\nc: {<<: *a}\n"
    found = prompts(write("a.yaml", honest), count=3).load()
    assert [(p.text, p.seed) for p in found] == [("x", 1), ("x", 2), ("x", 1)]


@pytest.mark.parametrize("keep", [0, 10, 60, 200])
def test_pictures_that_cannot_be_decoded(write, tmp_path, keep):
    Image.effect_noise((16, 16), 50).save(tmp_path / "whole.png")
    write("part.png", (tmp_path / "whole.png").read_bytes()[:keep])
    assert prompts(write("a.jsonl", '{"prompt": "a", "image": "whole.png"}')).load()
    file = write("a.jsonl", '{"prompt": "b", "image": "part.png"}')
    with pytest.raises(ConfigError, match=r"row 1: the image .*part\.png can't be read as a pict"):
        prompts(file).load()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ConfigError, match=r"pipe\.png does not exist"):
        prompts(write("b.jsonl", '{"prompt": "a", "image": "pipe.png"}')).load()


# As before: files that `datasets` read give the same rows


TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20
).filter(lambda text: text.strip() and text not in MISSING)  # fmt: skip


@given(st.lists(st.tuples(TEXTS, st.integers(0, 2**53)), min_size=1, max_size=5))
def test_every_format_tells_the_same(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("p")
    listed = [{"prompt": text, "seed": seed} for text, seed in written]
    table = datasets.Dataset.from_list(listed)
    table.to_parquet(folder / "a.parquet")
    table.to_csv(folder / "a.csv", index=False)
    (folder / "a.json").write_text(json.dumps(listed))
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    for file in sorted(folder.iterdir()):
        found = [(row["prompt"], row["seed"]) for row in rows(file, "prompt", 0)]
        assert found == written, file.suffix
        assert list(rows(file, "prompt", 1)) == list(rows(file, "prompt", 0))[1:]


def test_messages_stay_short():
    deep: list = []
    for _ in range(30):
        deep = [deep] * 9
    for value in (deep, "x" * 10**6, 10**5000, {"a": deep}, 2**70):
        assert len(shortly(value)) < 300


def test_what_is_transparent_is_white(tmp_path):
    """Its colour shows nowhere, so it is none that a model should see."""
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255, 255))
    picture.save(tmp_path / "a.png")
    opened = open_picture(tmp_path / "a.png")
    assert opened.mode == "RGB"
    assert [opened.getpixel(place) for place in ((0, 0), (1, 1))] == [(0, 0, 255), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_channels_of_more_than_8_bits(tmp_path, mode):
    Image.new(mode, (16, 16), 40000).save(tmp_path / "a.tiff")
    with pytest.raises(ConfigError, match=r"a\.tiff has more than 8 bits a channel"):
        open_picture(tmp_path / "a.tiff")


@pytest.mark.parametrize("size", [(1, 1), (64, 15), (16, 513)])
def test_pictures_too_small_or_narrow(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=rf"is {size[0]} x {size[1]} pixels; .* at least 16"):
        open_picture(tmp_path / "a.png")
    Image.new("RGB", (16, 512)).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == (16, 512)


def test_pictures_too_large(tmp_path, monkeypatch):
    """By Pillow's bound too, which warns of half of what it refuses."""
    monkeypatch.setattr(prompt_files, "MOST_PIXELS", 1 << 10)
    for size in ((32, 32), (32, 33)):
        Image.new("RGB", size).save(tmp_path / f"{size[1]}.png")
    assert open_picture(tmp_path / "32.png").size == (32, 32)
    for bound in (1 << 20, 600, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
        with pytest.raises(ConfigError, match=r"33\.png is .*at most .* pixels .*smaller copy"):
            open_picture(tmp_path / "33.png")


def test_a_picture_is_upright_as_the_camera_says(tmp_path):
    turned = Image.Exif()
    turned[ORIENTATION] = 6  # a quarter to the right
    Image.new("RGB", (48, 32)).save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (48, 32)).save(tmp_path / "b.jpg")
    assert open_picture(tmp_path / "a.jpg").size == (32, 48)
    assert open_picture(tmp_path / "b.jpg").size == (48, 32)
    assert [treatment(tmp_path / name) for name in ("a.jpg", "b.jpg")] == [{"upright"}, set()]


def test_one_of_several_pictures_is_not_chosen(tmp_path):
    frames = [Image.new("RGB", (16, 16), (n, 0, 0)) for n in (0, 99)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ConfigError, match=r"a\.gif holds 2 pictures"):
        open_picture(tmp_path / "a.gif")
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])  # of a camera
    assert open_picture(tmp_path / "a.mpo").size == (16, 16)


def test_colours_of_16_bits(tmp_path):
    """Pillow reads them as 8 bits, in silence."""
    part = lambda kind, data: (  # noqa: E731
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    head = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    rows = zlib.compress(16 * (b"\0" + 16 * b"\x9c\x40\x01\x2c\x4e\x20"))
    file = tmp_path / "a.png"
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")
    )
    with pytest.raises(ConfigError, match="more than 8 bits a channel"):
        open_picture(file)


def test_text_that_is_no_utf_8(write):
    for content in ('{"prompt": "café"}'.encode("latin1"), '{"prompt": "a"}'.encode("utf-16")):
        with pytest.raises(ConfigError, match="is no text in UTF-8"):
            prompts(write("a.jsonl", content)).load()


def test_places_that_hold_no_prompts(write):
    file = write("a.jsonl", '{"prompt": "a"}')
    with pytest.raises(ConfigError, match="path is empty"):
        prompts(" ")
    with pytest.raises(ConfigError, match="is an address, no file here"):
        prompts("https://example.com/a.jsonl").load()
    with pytest.raises(ConfigError, match="subset='x' is a part of a dataset on the hub"):
        prompts(file, subset="x").load()


@pytest.mark.parametrize(
    ("column", "meant"),
    [("sed", "seed"), ("images", "image"), ("negativ_prompt", "negative_prompt"),
     ("image_id", None), ("caption", None)],
)  # fmt: skip
def test_columns_that_are_almost_read_are_said(write, caplog, column, meant):
    prompts(write("a.jsonl", f'{{"prompt": "a", "{column}": 1}}')).load()
    assert [record.args[1:] for record in caplog.records] == ([(column, meant)] if meant else [])


@pytest.mark.parametrize(("given", "says"), [(5, "image 5 is no path"), ('""', "image is empty")])
def test_what_is_no_picture(write, given, says):
    with pytest.raises(ConfigError, match=says):
        prompts(write("a.jsonl", f'{{"prompt": "a", "image": {given}}}')).load()
