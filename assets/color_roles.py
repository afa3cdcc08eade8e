"""Which part of a scene a color word of its caption names: what T5 is taught besides drawing.

FluxPipeline gives text tokens no position, so only T5 can tell "from red to blue" from "from blue
to red". Flow matching alone hardly asks it to; labels for the color words do.
B batch.
"""

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Tokenizer

from dirotq.assets.scenes import COLOR_1, COLOR_2, COLORS

ROLES = 3  # 0 color of an object, 1 and 2 first and second color of the background
NO_ROLE = -1  # of every token that is not a color


def color_roles(scenes: np.ndarray, t5_ids: np.ndarray, tokenizer: T5Tokenizer) -> np.ndarray:
    """Label every token of the captions of `scenes`: int8 [B, 48], `NO_ROLE` if not a color.

    scenes  int64 [B, 22]; no object has a color of the background, so the color tells the role
    t5_ids  integer [B, 48], one token per color word
    """
    words = np.array(tokenizer.convert_tokens_to_ids([f"\u2581{color}" for color in COLORS]))
    first, second = words[scenes[:, COLOR_1]], words[scenes[:, COLOR_2]]
    second = np.where(scenes[:, COLOR_2] >= 0, second, NO_ROLE)  # no token has this number
    roles = np.where(np.isin(t5_ids, words), 0, NO_ROLE)
    roles[t5_ids == first[:, None]] = 1
    roles[t5_ids == second[:, None]] = 2
    return roles.astype(np.int8)


def role_loss(logits: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and accuracy over the color words of a batch, float32 scalars.

    logits  [B, 48, 3]
    roles   int8 [B, 48], as `color_roles` labels them; without any color word both are 0
    """
    labels = roles.long().flatten()
    guesses = logits.float().flatten(0, 1)
    colored = labels != NO_ROLE
    count = colored.sum().clamp(min=1)
    accuracy = ((guesses.argmax(-1) == labels) & colored).sum() / count
    total = F.cross_entropy(guesses, labels, ignore_index=NO_ROLE, reduction="sum")
    return total / count, accuracy
