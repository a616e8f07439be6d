"""Pictures in the page."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from dnc_dist.report import names
from dnc_dist.report.markup import Html, element
from dnc_dist.rundir.diagnosis import Diagnosis


def data_url(pixels: np.ndarray) -> str:
    """A picture as an address: the smaller of PNG and JPEG; (height, width, 3) uint8."""
    versions = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        versions.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(versions)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(found: Diagnosis, number: int, cls: str = "") -> Html:
    """A picture of a diagnosis, with its class and its file as words."""
    words = f"{names.full(str(found.names[number]))}, {str(found.sources[number])[:300]}"
    return element("img", src=data_url(found.images[number]), alt=words, title=words, width="64", height="64", cls=cls)
