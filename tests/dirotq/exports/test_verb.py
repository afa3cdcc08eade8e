import pytest
from tiny_line import run

from dirotq.cli import main

CONVROT = ("method=convrot", "weight_format=int4_channel", "act_format=int4_token")


def call(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main(["export", *map(str, words)])
    return left.value.code, capsys.readouterr()


def test_export_tells_what_it_wrote(line, tmp_path, capsys):
    packed = run(line(*CONVROT, "until=pack"))["pack"]
    out = tmp_path / "tiny.safetensors"
    status, said = call(capsys, packed.path, "convrot_w4a4", "--out", out)
    assert not status
    assert f"{out}: 0.2 MB; 3 layers as awq_w4a16, 10 layers as convrot_w4a4" in said.out
    status, said = call(capsys, packed.path, "convrot_w4a4", "--out", out)
    assert status == 2
    assert "is there already" in said.err
    assert not call(capsys, packed.path, "convrot_w4a4", "--out", out, "--overwrite")[0]


def test_a_folder_that_is_not_there(tmp_path, capsys):
    status, said = call(capsys, tmp_path / "nothing", "nvfp4")
    assert status == 2
    assert "nothing does not exist" in said.err
