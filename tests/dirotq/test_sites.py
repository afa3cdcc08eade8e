import pytest
from tiny_line import WIDTH

from dirotq import sites
from dirotq.cli import main
from dirotq.models import families
from dirotq.models.family import ModelFamily, Site


@pytest.fixture
def listed(capsys):
    """``listed(*words)``: status and output of `dirotq sites` with the real settings."""

    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(["sites", *map(str, words)])
        return left.value.code, capsys.readouterr()

    return call


def test_each_kind_of_site_is_a_line(listed, folder):
    status, (out, _) = listed(folder)
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    shape = f"{WIDTH} -> {WIDTH} + {WIDTH} + {WIDTH}"
    at = lines.index(f"1 x transformer_blocks.*.attn.qkv {shape} (block bias)")
    assert lines[at + 1] == "= transformer_blocks.*.attn.to_q, to_k, to_v"
    assert f"1 x transformer_blocks.*.attn.add_qkv {shape} (block bias text)" in lines
    assert "1 x proj_out (by the table models/flux.py)" in lines
    assert listed(f"model={folder}")[1].out == out


def test_what_has_no_table_is_traced_and_a_table_drafted(listed, folder, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", ())
    status, (out, _) = listed(folder)
    assert (status, "stay in 16 bits:" in out) == (0, True)
    assert "x_embedder  (lies outside of the repeated blocks)" in out
    names = {}
    drafted = listed(folder, "--table")[1].out
    exec(drafted.replace("from .family", "from dirotq.models.family"), names)
    family = names["FLUX"]
    assert isinstance(family, ModelFamily)
    assert family.call["num_inference_steps"] == 3
    assert "# - text=True" in drafted
    monkeypatch.setattr(families, "FAMILIES", (family,))
    again = listed(folder)[1].out
    assert {line for line in again.splitlines() if "  (by the table" not in line} == {
        line for line in out.splitlines() if "  (lies outside" not in line
    }


def test_blocks_of_one_kind_are_counted():
    def site(number):
        paths = tuple(f"blocks.{number}.{name}" for name in ("attn.q", "mlp"))
        return Site(f"blocks.{number}.both", paths, 8, (8, 16), "block", False, pointwise=True)

    lines = sites.told([site(0), site(1)], {"blocks.0.out.0": "why", "blocks.1.out.0": "why"})
    assert [line.strip() for line in lines] == [
        "4 linears in 2 sites are packed:",
        "2 x blocks.*.both  8 -> 8 + 16  (block 1x1)",
        "= blocks.*.attn.q, mlp",
        "2 linears stay in 16 bits:",
        "2 x blocks.*.out.0  (why)",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tiny_flx"], "no such model. Did you mean `tiny_flux`? Known models are"),
        (["/no/where"], "no such model. Known models are"),
        ([], "the following arguments are required: MODEL"),
        (["--tabel", "tiny_flux"], "did you mean `--table`"),
    ],
)
def test_what_is_no_model(listed, words, says):
    status, (out, err) = listed(*words)
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
