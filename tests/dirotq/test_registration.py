"""diffusers reads packed folders after ``import dirotq``, whichever of the two came first."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Without a dtype: pack sees to it that all components then load in float32.
LOAD = """
import torch
pipe = DiffusionPipeline.from_pretrained(FOLDER)
print(type(pipe.transformer.single_transformer_blocks[0].proj_out).__name__)
print(pipe("dots", num_inference_steps=1, height=32, width=32, max_sequence_length=8,
           output_type="pt").images.isfinite().all().item())
"""


def fresh(
    code: str, *, check: bool = True, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import gc\ngc.disable()  # it ends soon\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=cwd)


@pytest.fixture
def load(finished) -> str:
    return LOAD.replace("FOLDER", repr(str(finished["pack"].tree("model"))))


def test_diffusers_first(load):
    """From the root, where a folder has the name of Hugging Face's package `kernels`."""
    imports = "import diffusers\nfrom diffusers import DiffusionPipeline\nimport dirotq\n"
    file, *said = fresh(f"{imports}print(diffusers.__file__)\n{load}", cwd=ROOT).stdout.split()
    assert "site-packages" in file
    assert said == ["QuantLinear", "True"]


def test_dirotq_first_registers_once_and_leaves_no_hook(load):
    said = fresh(
        """
import sys, dirotq
from dirotq._registration import register_when_imported
LATER = "peft", "diffusers.loaders.lora_pipeline"
watching = lambda: sum(type(f).__name__ == "_Watch" for f in sys.meta_path)
register_when_imported()
from dirotq._registration import OURS
print(watching() - len(OURS), "diffusers" in sys.modules)
import diffusers.quantizers.auto as auto
register_when_imported()
hosts = {getattr(finder, "host", "") for finder in sys.meta_path}
print("diffusers.quantizers.auto" in hosts)
print(auto.AUTO_QUANTIZER_MAPPING["dirotq"].__name__, auto.__spec__.name)
import dirotq.quantizer
print(auto.AUTO_QUANTIZER_MAPPING["dirotq"] is dirotq.quantizer.DirotqQuantizer)
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
print(*{getattr(finder, "host", "") for finder in sys.meta_path} - {"", *LATER})
"""
        + load
    ).stdout.split()
    assert said[:2] == ["0", "False"]
    assert said[2:6] == ["False", "DirotqQuantizer", "diffusers.quantizers.auto", "True"]
    assert said[6:] == ["QuantLinear", "True"]
