"""`make tune`: times every plan of this GPU on a grid of shapes, for kernels/plans.json.

usage: python benchmarks/tune.py [--formats w4a4 ...] [--m 1 4096 ...] [--k 3072 ...] [--n ...]
           [--seconds 200] [--into kernels/plans.json]

What `dirotq tune` does (dirotq/tuning), in every format, for the table that we ship. Shapes that
are timed take the place of their old rows, one after the other; the others keep theirs.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from dirotq.errors import UnsupportedError
from dirotq.kernels.measured import TABLE, Entry
from dirotq.tune import say, usable_gpu
from dirotq.tuning import session
from dirotq.tuning.compiling import compile_all
from dirotq.tuning.fastest import Shape
from dirotq.tuning.random_linear import FORMATS
from dirotq.tuning.shapes import grid


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    for letter in "mkn":
        parser.add_argument(f"--{letter}", nargs="+", type=int, help="only these")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop timing after")
    parser.add_argument("--into", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    try:
        chip, _ = usable_gpu()
    except UnsupportedError as error:
        print(error, file=sys.stderr)
        return 1
    begin = time.monotonic()
    shapes = list(grid(options.formats, options.m, options.k, options.n))
    table = json.loads(options.into.read_text()) if options.into.is_file() else {}

    def keep(shape: Shape, rows: list[Entry]) -> None:
        table[str(chip)] = session.merged(table.get(str(chip), {}), shape, rows)
        options.into.write_text(dumped(table))

    deadline = begin + options.seconds
    compile_all(shapes, chip, deadline, say)
    say(f"{session.measure(shapes, chip, keep=keep, deadline=deadline, say=say)}")
    return 0


def dumped(table: Mapping[str, Mapping[str, list[Entry]]]) -> str:
    """Write JSON with a line per row."""
    chips = []
    for chip, kinds in sorted(table.items()):
        lines = [
            f'  "{kind}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
            for kind, rows in kinds.items()
        ]
        chips.append(f' "{chip}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(chips) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
