import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from basalt.data.images import ImageError, decode_image, to_square

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def two_halves(mode: str = "RGB", left=RED, right=BLUE) -> Image.Image:
    image = Image.new(mode, (40, 20), left)
    image.paste(right, (20, 0, 40, 20))
    return image


def close(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int], slack: int = 12) -> bool:
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return all(abs(found - wanted) <= slack for found, wanted in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_are_told_by_content(form: str) -> None:
    image = decode_image(encoded(two_halves(), form))
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert close(image, (8, 10), RED)
    assert close(image, (32, 10), BLUE)


@pytest.mark.parametrize(
    ("orientation", "size", "red_at"),
    [
        (1, (40, 20), (8, 10)),
        (2, (40, 20), (32, 10)),
        (3, (40, 20), (32, 10)),
        (6, (20, 40), (10, 8)),
        (8, (20, 40), (10, 32)),
    ],
)
def test_exif_orientation_is_turned_upright(orientation: int, size: tuple[int, int], red_at: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encoded(two_halves(), "JPEG", exif=exif, subsampling=0))
    assert image.size == size
    assert close(image, red_at, RED)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_on_white(form: str) -> None:
    image = decode_image(encoded(two_halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)), form))
    assert close(image, (8, 10), RED)
    assert close(image, (32, 10), WHITE)


def test_half_transparency_is_mixed_with_white() -> None:
    image = decode_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG"))
    assert close(image, (1, 1), (255, 127, 127), 1)
    grey = decode_image(encoded(Image.new("LA", (4, 4), (0, 128)), "PNG"))
    assert close(grey, (1, 1), (127, 127, 127), 1)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_palette_s_transparent_colour_is_white(form: str) -> None:
    palette = two_halves().quantize(2)
    transparent = palette.getpixel((32, 10))
    image = decode_image(encoded(palette, form, transparency=transparent))
    assert close(image, (8, 10), RED)
    assert close(image, (32, 10), WHITE)


def test_a_transparent_colour_of_a_plain_png_is_white() -> None:
    image = decode_image(encoded(two_halves(), "PNG", transparency=BLUE))
    assert close(image, (8, 10), RED)
    assert close(image, (32, 10), WHITE)


def test_cmyk_jpeg() -> None:
    image = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert image.mode == "RGB"
    assert close(image, (8, 8), RED)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(form: str) -> None:
    image = Image.new("I;16", (4, 4), 65535)
    for x, value in enumerate((0, 16384, 32768)):
        image.putpixel((x, 0), value)
    decoded = decode_image(encoded(image, form))
    assert [decoded.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 63, 127, 255)]


def test_a_dark_16_bit_grey_stays_dark() -> None:
    assert decode_image(encoded(Image.new("I;16", (4, 4), 200), "PNG")).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("brightest", [255, 65535, 2_000_000_000])
def test_32_bit_grey_is_scaled_to_what_it_holds(brightest: int) -> None:
    image = Image.new("I", (4, 4), brightest)
    image.putpixel((0, 0), brightest // 2)
    decoded = decode_image(encoded(image, "TIFF"))
    assert close(decoded, (0, 0), (127, 127, 127), 1)
    assert close(decoded, (3, 3), WHITE, 0)


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 255)])
def test_plain_greys(mode: str, colour: int) -> None:
    assert close(decode_image(encoded(Image.new(mode, (4, 4), colour), "PNG")), (1, 1), WHITE, 0)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_shows_its_first_frame(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    image = decode_image(encoded(frames[0], form, save_all=True, append_images=frames[1:]))
    assert close(image, (8, 8), RED)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(form: str) -> None:
    whole = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), form)
    with pytest.raises(ImageError):
        decode_image(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"hello, this is text, not a picture\n" * 20, "not a JPEG, PNG, WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG, PNG, WebP"),
        (b"%PDF-1.7\n%%EOF", "not a JPEG, PNG, WebP"),
        (b"\xff\xd8\xff", "not a JPEG|damaged"),
    ],
)
def test_what_is_not_an_image_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        decode_image(data)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [7_000, 12_000, 60_000])  # below Pillow's warning, at it, and beyond its error
def test_bombs_are_refused_by_their_header(side: int) -> None:
    with pytest.raises(ImageError, match=r"pixels.*send a smaller one"):
        decode_image(png_header(side, side))


def test_the_limit_is_the_caller_s() -> None:
    data = encoded(Image.new("RGB", (100, 100)), "PNG")
    assert decode_image(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(ImageError, match="100 × 100"):
        decode_image(data, max_pixels=9_999)


def test_errors_hold_no_address_of_the_process() -> None:
    whole = encoded(Image.effect_noise((64, 64), 80), "PNG")
    for data in (b"plain text" * 9, whole[:300], whole[:40] + bytes(60) + whole[100:]):
        with pytest.raises(ImageError) as error:
            decode_image(data)
        assert "0x" not in str(error.value)
        assert "BytesIO" not in str(error.value)


def rgb_or_refused(data: bytes) -> None:
    try:
        image = decode_image(data, max_pixels=1_000_000)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert len(image.tobytes()) == 3 * image.width * image.height


MAGIC = (
    b"",
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
    b"GIF89a",
    b"RIFF\x40\0\0\0WEBPVP8 ",
    b"BM",
    b"II*\0",
    b"MM\0*",
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_random_bytes_give_an_image_or_an_image_error(magic: bytes, rest: bytes) -> None:
    rgb_or_refused(magic + rest)


PHOTOS = {
    form: encoded(Image.effect_noise((24, 16), 90).convert("RGB"), form)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PHOTOS)), st.data())
def test_mutated_images_give_an_image_or_an_image_error(form: str, data: st.DataObject) -> None:
    mutated = bytearray(PHOTOS[form])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(mutated) - 1), st.integers(0, 255)), max_size=6)
    ):
        mutated[place] = value
    rgb_or_refused(bytes(mutated[: data.draw(st.integers(0, len(mutated)))]))


def test_to_square() -> None:
    wide = two_halves()
    squeezed = to_square(wide, 16, "resize")
    assert squeezed.size == (16, 16)
    assert close(squeezed, (2, 0), RED)
    padded = to_square(wide, 16, "pad")
    assert padded.size == (16, 16)
    assert close(padded, (2, 0), (127, 127, 127), 0)
    assert close(padded, (2, 8), RED)
