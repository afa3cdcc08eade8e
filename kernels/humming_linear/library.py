"""Humming (github.com/vllm-project/humming, Apache-2.0): an optional package that compiles a kernel
for every shape when it is first asked for.

Letters: M rows, N outputs, K columns of the main branch.
"""

import functools
import importlib
import json
import logging
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import compile_cache
from ..buffers import Codes, Repacked
from ..chip import say_once
from ..formats.spec import QuantSpec

CHIPS = (80, 86, 89, 90)
"""Chips whose products take the layout of ``reference.py``."""

STEP = 64
"""What N and K are multiples of."""

LEAST = 256
"""Rows from which it is a candidate: fewer wait for the weights, which are read and written once
more for it, and each number of rows costs a compilation."""

PACKAGE = "humming-kernels"
INSTALL = "pip install 'dirotq[humming]'"
COMPILER = "NVRTC or nvcc with CUDA's headers: a toolkit, or pip install 'humming-kernels[cu13]'"

VERSIONS = ("0.1.20",)
"""Versions whose layouts were read. They are no public interface: another version may have others,
and would compute something else without a word."""


class NotCompiledError(Exception):
    """Humming could not compile its kernel here."""


def why_not(chip: int, m: int, n: int, spec: QuantSpec, dtype: torch.dtype) -> str | None:
    """Return why Humming is not used for M rows and N outputs of a linear; None if it can be.

    chip  compute capability (90: 9.0)
    """
    if chip not in CHIPS:
        return f"Humming is not used on sm_{chip}"
    if dtype != torch.bfloat16:  # its sums, before the weights' scales, leave float16
        return f"Humming is used in bfloat16, not {str(dtype).removeprefix('torch.')}"
    acts = spec.activations
    if spec.weights.name != "channel" or acts.element not in ("int4", "int8"):
        return "Humming is used for integers with one weight scale per output"
    if acts.granularity != "token":
        return "Humming is used for one activation scale per row"
    if m < LEAST:
        return f"Humming is used for {LEAST} rows and more, not {m}"
    if n % STEP or spec.width % STEP:
        return f"Humming takes multiples of {STEP} columns and outputs, not {spec.width} -> {n}"
    return missing()


@functools.cache
def missing() -> str | None:
    """Return what of the package is not there; None if it can be used."""
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return f"Humming is not installed ({INSTALL})"
    if version not in VERSIONS:
        return f"{PACKAGE} {version} is installed; {' or '.join(VERSIONS)} is known ({INSTALL})"
    return None


def multiply(codes: Codes, weights: Repacked, wp_NR: Tensor | None) -> Tensor:
    """Return y [M, N], bf16: the product, scaled, plus bias, plus the low-rank branch c (W P)ᵀ.

    Raises NotCompiledError if the shape's kernel can't be compiled.
    """
    a_MK, bias = codes.codes, weights.bias
    m, n = len(a_MK), len(weights.weights)
    kernel = compiled(m, n, a_MK.shape[1], bias is not None, a_MK.device)
    y = a_MK.new_empty((m, n), dtype=torch.bfloat16)
    _module("humming.ops").launch_kernel(
        configs=kernel, inputs=a_MK, weight=weights.weights, weight_scale=weights.scale,
        input_scale=codes.scale, bias=bias, outputs=y, locks=weights.locks,
    )  # fmt: skip
    return y if codes.c is None or wp_NR is None else y.addmm_(codes.c, wp_NR.mT)


@functools.lru_cache(maxsize=4096)
def compiled(m: int, n: int, k: int, bias: bool, device: torch.device) -> Tensor:
    """Compile the kernel of a shape, some seconds, or find it on disk; return its handle.

    Raises NotCompiledError.
    """
    layer = {
        "shape_n": n, "shape_k": k, "a_dtype": "int8", "b_dtype": "uint4", "c_dtype": "bfloat16",
        "has_bias": bias,
    }  # fmt: skip
    compile_cache.humming()
    say_once(f"Humming compiles its kernels of {k} -> {n}: some seconds, once", logging.INFO)
    with _disable_current_modes():  # what it does to tensors here is no part of a linear
        return _compiled(layer, m, device)


def _compiled(layer: dict[str, Any], m: int, device: torch.device) -> Tensor:
    try:
        if not _module("humming.config").LayerConfig(**layer).use_flat_weight:
            raise NotCompiledError("unset HUMMING_DISABLE_PATCH_CUBIN: it changes layouts")
        tuned = _module("humming.tune").get_heuristics_config(layer, shape_m=m, device=device)
        prepare = _module("humming.kernel.humming").HummingKernel.prepare_kernels
        return prepare(json.dumps(layer), None, json.dumps(tuned), device)
    except (NotCompiledError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # no compiler, no headers, a configuration that does not fit
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise NotCompiledError(f"{why}; Humming needs {COMPILER}") from error


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(name)
