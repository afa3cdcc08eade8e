"""Every example runs, on the tiny pipeline, and says what it promises."""

import runpy
from pathlib import Path

import pytest
from tiny_line import overrides

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "compress_and_load.py": r"PSNR",
    "compress_a_pipeline.py": r"bits per parameter",
    "compare_methods.py": r"rtn       PSNR",
}


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name, finished, tiny_root, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    _, *words = overrides(tiny_root, tiny_root / "store")  # what `finished` made is cached there
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    main(str(folder), *words)
    assert SAYS[name] in capsys.readouterr().out
    assert (tmp_path / "star.png").is_file() == (name == "compress_and_load.py")
    assert f"\nusage: python examples/{name} [" in (EXAMPLES / name).read_text()
