"""Images as people and judges see them: 8-bit pictures."""

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor


def eight_bits(image: Tensor) -> np.ndarray:
    """Round [3, H, W] in [0, 1] as the PNG that papers score would hold it: uint8 [H, W, 3]."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def picture(image: Tensor) -> Image.Image:
    """Make an 8-bit picture of [3, H, W] in [0, 1]."""
    return Image.fromarray(eight_bits(image))


def png_url(image: Tensor) -> str:
    """Make a PNG data URL of [3, H, W] in [0, 1]."""
    buffer = io.BytesIO()
    picture(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
