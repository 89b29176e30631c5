"""Every kind of image file: seen as `open_image` and diffusers see it, its size known from its header, broken ones named."""

import json
import re
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from loca_vision.data.captions import CaptionedImages, read_captioned
from loca_vision.data.check_images import check_readable
from loca_vision.data.images import open_image
from loca_vision.data.rows import RowImages
from support.pairs import picture

datasets = pytest.importorskip("datasets")


def transparent(mode):
    image = picture(0).convert(mode)
    image.putalpha(picture(1).convert("L"))
    return image


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def grey16():
    return Image.fromarray(np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16))


def animated(path):
    picture(0).save(path, save_all=True, append_images=[picture(1), picture(2)], duration=50, lossless=True)


KINDS = {
    "rgba.png": lambda path: transparent("RGBA").save(path),
    "la.png": lambda path: transparent("LA").save(path),
    "palette.png": lambda path: picture(0).convert("P").save(path, transparency=bytes(range(256))),
    "one.png": lambda path: picture(0).convert("1").save(path),
    "grey.png": lambda path: picture(0).convert("L").save(path),
    "grey16.png": lambda path: grey16().save(path),
    "cmyk.jpg": lambda path: picture(0).convert("CMYK").save(path),
    "cmyk.tiff": lambda path: picture(0).convert("CMYK").save(path),
    "animated.gif": animated,
    "animated.webp": animated,
    "mpo.jpg": lambda path: picture(0).save(path, "MPO", save_all=True, append_images=[picture(1)]),
    "icon.ico": lambda path: picture(0, (32, 32)).save(path, sizes=[(16, 16), (32, 32)]),
    "plain.bmp": lambda path: picture(0).save(path),
}
SIDEWAYS = [(kind, orientation) for kind in ("JPEG", "PNG", "WebP", "TIFF", "MPO") for orientation in range(1, 10)]


def in_folder(folder, name, write):
    """The image as the only one of a folder."""
    folder.mkdir()
    write(folder / name)
    (folder / name).with_suffix(".txt").write_text("x")
    return read_captioned(folder)


def in_rows(content, name="a.png"):
    """The image as the only one of a data set that holds its bytes."""
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [content and {"path": name, "bytes": content}], "text": ["x"]}, kinds)
    return CaptionedImages(RowImages(rows, "image", "rows"), ["x"], "rows")


def assert_alike(there, image):
    """The image is this one, and its size is known without it."""
    assert there.sizes == [image.size] and there[0].image.mode == "RGB"
    assert np.array_equal(np.asarray(there[0].image), np.asarray(image))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_as_open_image_reads_it(name, tmp_path):
    there = in_folder(tmp_path / "set", name, KINDS[name])
    file = tmp_path / "set" / name
    assert_alike(there, open_image(file))
    assert_alike(in_rows(file.read_bytes(), name), open_image(file))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by diffusers
@pytest.mark.filterwarnings("ignore:Palette images:UserWarning")
@pytest.mark.parametrize("name", [name for name in KINDS if name != "grey16.png"])
def test_every_kind_is_as_diffusers_loads_it(name, tmp_path):
    from diffusers.utils import load_image

    assert_alike(in_folder(tmp_path / "set", name, KINDS[name]), load_image(str(tmp_path / "set" / name)))


def test_grey_of_sixteen_bits_keeps_its_first_eight(tmp_path):
    image = in_folder(tmp_path / "set", "a.png", KINDS["grey16.png"])[0].image
    assert np.array_equal(np.asarray(image)[..., 0], (np.asarray(grey16()) // 256).astype(np.uint8))


@pytest.mark.parametrize(("kind", "orientation"), SIDEWAYS)
def test_a_camera_that_was_turned(kind, orientation, tmp_path):
    """Also 9, which stands for nothing."""
    name = {"JPEG": "a.jpg", "MPO": "a.jpg"}.get(kind, f"a.{kind.lower()}")
    there = in_folder(tmp_path / "set", name, lambda path: picture(0).save(path, kind, exif=turned(orientation)))
    assert there.sizes == [(8, 12) if orientation in (5, 6, 7, 8) else (12, 8)]
    assert_alike(there, open_image(tmp_path / "set" / name))


def png(*chunks, pixels=True):
    """A grey PNG of 3 x 1 pixels that is cut off in its pixels, or whole with these chunks behind them."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0abc"))]
    parts = [*parts, *chunks, (b"IEND", b"")] if pixels else parts
    data = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(data)[: None if pixels else -8]


def test_how_the_camera_was_turned_may_stand_behind_the_pixels_of_a_png():
    assert in_rows(png()).sizes == [(3, 1)]
    late = in_rows(png((b"eXIf", turned(6).tobytes()[6:])))
    assert_alike(late, Image.fromarray(np.array([[97], [98], [99]], np.uint8)).convert("RGB"))


def test_orientation_in_xmp():
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    info, file = PngImagePlugin.PngInfo(), BytesIO()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    picture(0).save(file, "PNG", pnginfo=info)
    there = in_rows(file.getvalue())
    assert_alike(there, open_image("x", BytesIO(file.getvalue())))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_an_exif_block_that_is_broken_says_nothing(tmp_path):
    there = in_folder(tmp_path / "set", "a.jpg", lambda path: picture(0).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert there.sizes == [there[0].image.size] == [(12, 8)]


@pytest.mark.parametrize("orientation", range(1, 10))
def test_an_exif_block_that_pil_reads_but_cannot_write_says_how_the_camera_was_turned(orientation):
    """One in which the width of the image is text."""
    entries = struct.pack(">HHIHHHHI4s", 0x0112, 3, 1, orientation, 0, 0x0100, 2, 4, b"1.5\0")
    file, sound = BytesIO(), BytesIO()
    picture(0).save(file, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\2" + entries + b"\0\0\0\0")
    picture(0).save(sound, "PNG", exif=turned(orientation))
    assert_alike(in_rows(file.getvalue()), open_image("x", sound))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff", "gif", "bmp"])
def test_sizes_decode_no_pixels(ending, tmp_path, monkeypatch):
    there = in_folder(tmp_path / "set", f"a.{ending}", lambda path: picture(0).save(path))

    def decoded(*_):
        raise AssertionError("pixels are decoded")

    with monkeypatch.context() as patched:
        patched.setattr("PIL.ImageFile.ImageFile.load", decoded)
        patched.setattr("PIL.Image.Image.convert", decoded)
        assert there.sizes == [(12, 8)]


# What is refused


def bomb():
    """A PNG whose header promises 10^10 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return png().replace(png()[16:29], header).replace(png()[29:33], struct.pack(">I", zlib.crc32(b"IHDR" + header)))


def content(image, kind="PNG"):
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_hostile_headers_are_refused_before_and_with_the_pixels():
    for bytes_, sentence in (
        (bomb(), "rows, row 0, image (a.png): it cannot be read as an image (Image size (10000000000 pixels) exceeds"),
        (b"", "it cannot be read as an image"),
        (b"no image", "it cannot be read as an image"),
        (content(picture(0))[:20], "it cannot be read as an image"),
        (content(picture(0), "EPS"), "it cannot be read as an image"),
        (content(Image.new("L", (101, 1))), "101 x 1 pixels: one side is over 100 times the other"),
        (content(Image.new("L", (1, 300))), "1 x 300 pixels: one side is over 100 times the other"),
    ):
        for look in (lambda there: there.sizes, lambda there: there[0]):
            with pytest.raises(ValueError, match=re.escape(sentence)):
                look(in_rows(bytes_))
    assert in_rows(content(Image.new("L", (100, 1)))).sizes == [(100, 1)]


def test_no_other_program_is_started_for_a_file_that_only_its_ending_calls_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript is started"))
    there = in_folder(tmp_path / "set", "a.png", lambda path: picture(0).save(path, "EPS"))
    with pytest.raises(ValueError, match=r"a\.png: it cannot be read as an image$"):
        there[0]


def test_broken_images_are_found_before_the_first_step_and_named(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        picture(0, (40, 40)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    there = read_captioned(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    (tmp_path / "c.png").unlink()
    assert there.sizes[:2] == [(40, 40), (40, 40)] if (tmp_path / "c.png").exists() else True
    with pytest.raises(
        ValueError, match=r"^2 of 3 images cannot be read: .*/b\.png: it cannot .*; .*/c\.png: there is no such"
    ):
        check_readable(there.__getitem__, len(there), "images", progress=False)


def test_a_broken_row_is_named_with_its_column_and_file(tmp_path):
    picture(0, (40, 40)).save(tmp_path / "a.png")
    half = (tmp_path / "a.png").read_bytes()[:2000]
    with pytest.raises(ValueError, match=r"^rows, row 0, image \(a\.png\): it cannot be read as an image \(.*truncated"):
        check_readable(in_rows(half).__getitem__, 1, "images", progress=False)
    with pytest.raises(ValueError, match=r"^rows, row 0: there is no image in image$"):
        in_rows(None)[0]
    lines = {"file_name": "a.png", "text": "x"}, {"file_name": "gone.png", "text": "y"}
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    there = read_captioned(tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"\(train\), row 1, image \(gone\.png\): there is no such image"):
        check_readable(there.__getitem__, len(there), "images", progress=False)


def test_whatever_a_decoder_raises_is_a_sentence(monkeypatch):
    there = in_rows(content(picture(0)))

    def fails(*_):
        raise struct.error("unpack requires 4 bytes")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    with pytest.raises(ValueError, match=r"row 0, image \(a\.png\): it cannot be read as an image \(unpack requires 4 bytes\)"):
        there[0]


def test_the_same_image_may_come_twice(tmp_path):
    for name in ("a.png", "b.png"):
        picture(0).save(tmp_path / name)
    there = read_captioned(tmp_path, caption="x")
    assert len(there) == 2 and np.array_equal(np.asarray(there[0].image), np.asarray(there[1].image))
