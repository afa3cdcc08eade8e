"""`dirotq tune` on the GPU that is here: two small shapes, measured, kept and chosen."""

import pytest
import torch

from dirotq import cli
from dirotq.kernels import measured
from dirotq.kernels.chip import capability
from dirotq.kernels.plan import choose, name_of, renew
from dirotq.tuning import compiling, shapes
from dirotq.tuning.fastest import Shape, plans
from dirotq.tuning.random_linear import spec_for

pytestmark = pytest.mark.gpu
SHAPES = [Shape(spec_for("w4a4", 1152, 3456), 256), Shape(spec_for("w4a16", 1152, 3456), 1)]


def test_what_is_measured_here_is_chosen_here(tmp_path, monkeypatch, capsys):
    chip = capability(torch.device("cuda"))
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path))
    monkeypatch.setattr(shapes, "grid", lambda kinds: iter(SHAPES))
    monkeypatch.setattr(compiling, "count_workers", lambda: 1)
    renew()
    try:
        with pytest.raises(SystemExit) as left:
            cli.main(["tune"])
        said = capsys.readouterr().out
        assert left.value.code == 0, said
        assert "2 shapes measured" in said and "skipped" not in said, said
        (table,) = measured.tuned(chip)
        assert table.shapes == 2
        for shape in SHAPES:
            kind, m, n, _ = shape.key
            plan = choose(chip, m, n, shape.spec, torch.bfloat16)
            assert plan.why.endswith(" here")
            assert name_of(plan) == table.plans[kind][0]["plan"]
            times = [row["us"] for row in table.plans[kind]]
            assert times == sorted(times) and 0 < times[0] < 1000
            assert name_of(plan) in map(name_of, plans(shape, chip))
    finally:
        monkeypatch.undo()
        renew()
