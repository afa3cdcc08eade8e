"""Images as people and judges see them: 8-bit pictures."""

import base64
import io

from PIL import Image
from torch import Tensor


def picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as an 8-bit picture."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def png_url(image: Tensor) -> str:
    """[3, H, W] in [0, 1] as a PNG data URL."""
    buffer = io.BytesIO()
    picture(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
