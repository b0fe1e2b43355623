"""A picture to try things on, drawn here, with questions that it answers."""

import io

from PIL import Image, ImageDraw, ImageFont

QUESTIONS = ("What does it say?", "What colour is the circle?", "Describe the image.")
SIZE = (480, 360)


def example_image() -> bytes:
    """PNG of a word above a red circle and a blue square."""
    image = Image.new("RGB", (SIZE[0] * 2, SIZE[1] * 2), "#f4f1ea")  # drawn at twice the size for smooth edges
    draw = ImageDraw.Draw(image)
    draw.text((480, 190), "OPEN", fill="#222222", font=ImageFont.load_default(220), anchor="mm")
    draw.ellipse((150, 360, 430, 640), fill="#d62828")
    draw.rectangle((550, 370, 810, 630), fill="#1d5fc4")
    out = io.BytesIO()
    image.resize(SIZE, Image.Resampling.LANCZOS).save(out, "PNG")
    return out.getvalue()
