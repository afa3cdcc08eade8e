"""Estimates of what sites disturb, on CUDA in bfloat16, beside those of the CPU in float32."""

import pytest
import torch
from tiny_line import method, run

from dirotq.models.call import load_probe
from dirotq.quantize.measure import site_errors
from dirotq.quantize.planning import make_plan
from dirotq.sources.model import DiffusersModel

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]


def test_estimates_are_those_of_the_cpu(line, folder):
    captured = run(line("until=basis", "device=cuda"))
    model = DiffusersModel(path=str(folder), call={})
    plan = make_plan(method("dirotq"), model.sites(), lambda site: (16, "a test"))
    cuda, cpu = (
        site_errors(
            model, [plan.blocks], captured["basis"], load_probe(captured["capture"]),
            torch.device(where),
        )[0]
        for where in ("cuda", "cpu")
    )  # fmt: skip
    assert list(cuda) == list(cpu)
    # The directions are the same. What hardly disturbs is rounded away in bfloat16.
    floor = sum(cpu.values()) / 20
    assert sum(error > floor for error in cpu.values()) > 1
    assert list(cuda.values()) == pytest.approx(list(cpu.values()), rel=0.5, abs=floor)
