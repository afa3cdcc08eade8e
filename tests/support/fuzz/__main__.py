"""``python -m fuzz --seconds 600 --readers lora manifest``: each reader for so long.

Prints examples tried, foreign exceptions, hangs and writes outside, each with its first example;
exits with 1 if there was any.
"""

import argparse
import random
import sys
import time
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from .attempt import Finding, attempt, sandbox
from .readers import READERS

BATCH = 100


def fuzz(name: str, seconds: float, start: int) -> tuple[int, dict[tuple[str, str], list[Finding]]]:
    """Examples tried in ``seconds``, and findings by what they are."""
    strategy, read = READERS[name]
    found: dict[tuple[str, str], list[Finding]] = {}
    tried = 0
    end = time.monotonic() + seconds
    with sandbox() as root:
        while time.monotonic() < end:
            start += 1

            @seed(start)
            @settings(
                max_examples=BATCH, database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(strategy)
            def batch(example: Any) -> None:
                nonlocal tried
                if time.monotonic() > end:
                    return
                tried += 1
                if (finding := attempt(read, example, root)) is not None:
                    found.setdefault((finding.kind, finding.what), []).append(finding)

            batch()
    return tried, found


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for each reader")
    parser.add_argument("--readers", nargs="*", default=[], choices=sorted(READERS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=random.randrange(2**30))
    options = parser.parse_args()
    failed = False
    for name in options.readers or READERS:
        tried, found = fuzz(name, options.seconds, options.seed)
        counts = dict.fromkeys(("foreign", "hang", "outside"), 0)
        for (kind, _), cases in found.items():
            counts[kind] += len(cases)
        print(
            f"{name}: {tried} examples (seed {options.seed}), {counts['foreign']} foreign "
            f"exceptions, {counts['hang']} hangs, {counts['outside']} writes outside"
        )
        for (kind, what), cases in sorted(found.items()):
            first = min(cases, key=lambda finding: len(finding.example))
            print(f"  {kind} x{len(cases)}: {what}\n    {first.detail}\n    {first.example[:600]}")
        failed |= bool(found)
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
