"""{reader: (examples, read)}: add a line here and both runs, short and long, have it.

``read(folder, example)`` puts the example into the empty folder and reads it. It may return or
raise a DirotqError; anything else is a finding (fuzz/attempt.py).
"""

from collections.abc import Mapping
from typing import Any

from fuzz_cli import COMMAND_LINES
from hypothesis import strategies as st

from . import core, weights
from .attempt import Read
from .prompts import CONTENTS, prompt_reader

READERS: Mapping[str, tuple[st.SearchStrategy[Any], Read]] = {
    **{f"prompts.{suffix}": prompt_reader(suffix) for suffix in CONTENTS},
    "lora": (weights.LORAS, weights.read_loras),
    "single_file": (weights.SINGLE, weights.read_single_file),
    "header": (weights.HEADERS, weights.read_headers),
    "manifest": (core.MANIFESTS, core.read_manifest),
    "digests": (core.DIGESTS, core.read_digests),
    "packed_config": (core.PACKED, core.read_packed),
    "recipe": (core.RECIPES, core.read_recipe),
    "store": (core.DAMAGE, core.read_store),
    "packed_folder": (core.FOLDERS, core.read_packed_folder),
    "command_line": (COMMAND_LINES, core.read_arguments),
}
