"""diffusers reads packed folders after ``import dirotq``, whichever of the two came first."""

import subprocess
import sys
from pathlib import Path

import pytest

# Without a dtype: pack sees to it that all components then load in float32.
LOAD = """
import torch
pipe = DiffusionPipeline.from_pretrained(FOLDER)
print(type(pipe.transformer.single_transformer_blocks[0].proj_out).__name__)
print(pipe("dots", num_inference_steps=1, height=32, width=32, max_sequence_length=8,
           output_type="pt").images.isfinite().all().item())
"""


def fresh(code: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=check)


@pytest.mark.parametrize(
    "imports",
    [
        "import dirotq\nfrom diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline\nimport dirotq",
    ],
    ids=["dirotq-first", "diffusers-first"],
)
def test_from_pretrained_in_both_orders(finished, imports):
    model: Path = finished["pack"].tree("model")
    said = fresh(imports + LOAD.replace("FOLDER", repr(str(model)))).stdout.split()
    assert said == ["QuantLinear", "True"]


def test_registering_is_idempotent_and_leaves_no_hook():
    said = fresh(
        """
import sys, dirotq
from dirotq._registration import register_when_imported
watching = lambda: sum(type(f).__name__ == "_Watch" for f in sys.meta_path)
register_when_imported()
print(watching(), "diffusers" in sys.modules)
import diffusers.quantizers.auto as auto
register_when_imported()
print(watching(), auto.AUTO_QUANTIZER_MAPPING["dirotq"].__name__, auto.__spec__.name)
import dirotq.quantizer
print(auto.AUTO_QUANTIZER_MAPPING["dirotq"] is dirotq.quantizer.DirotqQuantizer)
"""
    ).stdout.split()
    assert said == ["1", "False", "0", "DirotqQuantizer", "diffusers.quantizers.auto", "True"]
