"""Write the prompt sets of the embedded models: python -m dirotq.assets.make_prompts

tiny_calibration.jsonl comes from the side of the scene space that they were trained on,
tiny_heldout.jsonl from the side they have never seen; general.jsonl is written by hand.
"""

import json
from pathlib import Path

from dirotq.assets.captions import prompt_rows

PROMPTS = Path(__file__).resolve().parent / "prompts"
CALIBRATION_SEED, HELDOUT_SEED = 101, 202
CALIBRATION_COUNT, HELDOUT_COUNT = 128, 512


def prompt_sets() -> dict[str, str]:
    """The text of every generated prompt file, by file name."""
    sets = {
        "tiny_calibration.jsonl": prompt_rows(
            CALIBRATION_COUNT, heldout=False, seed=CALIBRATION_SEED
        ),
        "tiny_heldout.jsonl": prompt_rows(HELDOUT_COUNT, heldout=True, seed=HELDOUT_SEED),
    }
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in sets.items()}


def main() -> None:
    PROMPTS.mkdir(exist_ok=True)
    for name, text in prompt_sets().items():
        (PROMPTS / name).write_text(text)
        print(f"{PROMPTS / name}: {text.count(chr(10))} prompts")


if __name__ == "__main__":
    main()
