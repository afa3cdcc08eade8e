"""Whether a tokenizer tells words apart: without its vocabulary transformers makes an empty one,
to which every prompt is the same.
"""

from pathlib import Path
from typing import Any

TEXT = "the quick brown fox jumps over the lazy dog, 0123456789"
"""Letters and figures: some of it is known to every vocabulary."""
WHOLE = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab.txt")
"""Files of which one alone holds a vocabulary."""
LEAST_SHARE = 0.5
"""Of the rows of an encoder's embedding: a vocabulary below it belongs to another encoder, or was
lost in part. Embeddings are padded by a few hundred rows, of tens of thousands."""


def missing_files(cls: Any, part: Path) -> list[str]:
    """Name lost files without which the class would make a tokenizer that knows no words."""
    lost = [] if (part / "tokenizer_config.json").is_file() else ["tokenizer_config.json"]
    known = dict(cls.vocab_files_names)
    if not known or any(list(part.glob(pattern)) for pattern in WHOLE):
        return lost  # bytes need no vocabulary (ByT5)
    parts = [file for kind, file in known.items() if kind != "tokenizer_file"]
    here = [file for file in parts if (part / file).is_file()]
    if here and len(here) == len(parts):
        return lost
    apart = f" (or {' and '.join(parts)})" if parts else ""
    return [*lost, f"tokenizer.json{apart}"]


def faults(tokenizer: Any, rows: int | None) -> list[str]:
    """Name what is wrong with a loaded tokenizer.

    rows  of the embedding of the encoder that reads its ids; None where that is unknown
    """
    made = tokenizer(TEXT)["input_ids"]
    if len(set(made) - set(tokenizer.all_special_ids)) < 2:
        return [
            "knows no words (every prompt becomes the same tokens): its vocabulary is empty or lost"
        ]
    if rows is None:
        return []
    special = {
        name: token
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")
        if (token := getattr(tokenizer, name, None)) is not None
    }
    over = [f"{name} {token}" for name, token in special.items() if token >= rows]
    if max(made) >= rows or tokenizer.vocab_size > rows or over:
        what = f" ({', '.join(over)})" if over else ""
        return [
            f"has a vocabulary of {tokenizer.vocab_size} tokens{what}, its text encoder an "
            f"embedding of {rows} rows: they belong to two models"
        ]
    if len(tokenizer) < LEAST_SHARE * rows:
        return [
            f"knows {len(tokenizer)} tokens, its text encoder {rows}: its vocabulary was lost in "
            "part, or belongs to another model"
        ]
    return []
