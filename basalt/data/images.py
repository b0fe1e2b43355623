"""Bytes from anywhere to one upright RGB image. Pillow only: the gateway uses it too."""

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 40_000_000
MIN_SIDE, MAX_ASPECT = 2, 200  # of what any tower can make something of


class ImageError(ValueError):
    """The bytes are not an image we can show a tower. The message says why and what would be right."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the first frame of `data` by its content, never by a name or header.

    Returns:
        An RGB image, turned upright by its EXIF orientation, transparency laid on white.

    Raises:
        ImageError: empty, not an image, a format we do not take, truncated, over `max_pixels`, or of a shape that no
            tower takes. What a file says of its size is believed before anything is decoded.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes): send the bytes of a JPEG, PNG, WebP or GIF file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"the image has {width} × {height} pixels, more than the {max_pixels:,} allowed: send a smaller one"
                )
            if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
                raise ImageError(
                    f"the image has {width} × {height} pixels: send one whose sides are at least {MIN_SIDE} pixels, "
                    f"neither more than {MAX_ASPECT} times the other"
                )
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("the bytes are not a JPEG, PNG, WebP, GIF, BMP or TIFF image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"the image has more than the {max_pixels:,} pixels allowed: send a smaller one") from None
    except MemoryError:
        raise ImageError("the image takes more memory to decode than it may: send a smaller one") from None
    # Decoders meet hostile bytes here and each has its own way to fail; none may pass as anything but a bad
    # image. Their texts can hold addresses of this process (CVE-2026-22778), so they are not repeated.
    except Exception:
        raise ImageError("the image is truncated or damaged: it cannot be decoded") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit and float greys: Pillow's own conversion clips
        top = _white(image)
        image = image.convert("F").point(lambda value: value * (255.0 / top)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        canvas.alpha_composite(rgba)
        image = canvas
    return image.convert("RGB")


def _white(image: Image.Image) -> float:
    """What stands for white in a grey of more than 8 bits; wider ones do not say, so their brightest does."""
    if image.mode.startswith("I;16"):
        return 65535.0
    _, high = image.getextrema()
    brightest = float(high)  # type: ignore[arg-type]
    if image.mode == "F":
        return max(brightest, 1.0)
    return next((top for top in (255.0, 65535.0) if brightest <= top), brightest)


def to_square(image: Image.Image, size: int, fit: str) -> Image.Image:
    """Makes the tower's `size` × `size` square: `resize` squeezes, `pad` keeps the shape on grey borders."""
    if fit == "resize":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=(127, 127, 127))
