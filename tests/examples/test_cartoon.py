"""The cartoon filter: repeatable, few paints, ink at the edges of forms, at every size."""

import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from cartoon import cartoon
from support.photographs import scene

cv2 = pytest.importorskip("cv2")


def test_it_is_a_function_of_the_pixels():
    cv2.setRNGSeed(123)
    first = np.asarray(cartoon(scene()))
    cv2.setRNGSeed(4)
    assert (np.asarray(cartoon(scene())) == first).all()


def test_another_process_draws_the_same_with_more_threads():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import zlib, cv2, numpy as np\n"
        "cv2.setNumThreads(4)\n"
        "from support.photographs import scene; from cartoon import cartoon\n"
        "print(zlib.crc32(np.asarray(cartoon(scene())).tobytes()), cv2.getNumThreads())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == str(zlib.crc32(np.asarray(cartoon(scene())).tobytes()))
    assert said[1] != "1"  # what the caller chose is put back


@pytest.mark.parametrize("side", [16, 64, 128, 256])
def test_it_is_flat_with_ink_around_forms(side):
    photograph, drawn = np.asarray(scene(side)).astype(float), np.asarray(cartoon(scene(side))).astype(float)
    assert drawn.shape == photograph.shape
    centre, corner = slice(7 * side // 16, 9 * side // 16), slice(0, max(2, side // 16))
    assert drawn[centre, centre].std((0, 1)).max() < photograph[centre, centre].std((0, 1)).max()
    assert drawn[corner, corner].std((0, 1)).max() <= photograph[corner, corner].std((0, 1)).max()
    if side >= 64:  # the outline is darker than what is within it and what is around
        grey = drawn.mean(-1)[side // 2]
        assert grey[side // 8 : side // 3].min() < 0.75 * min(grey[: side // 16].mean(), grey[side // 2])


def test_paints_are_few():
    _, counts = np.unique(np.asarray(cartoon(scene(256))).reshape(-1, 3), axis=0, return_counts=True)
    assert np.sort(counts)[-7:].sum() > 0.95 * 256 * 256


def test_paints_do_not_depend_on_what_else_is_in_the_photograph():
    first, other = scene(256), scene(256)
    other.paste((250, 20, 200), (200, 0, 256, 256))
    drawn, changed = (np.asarray(cartoon(image))[:, :100] for image in (first, other))
    assert (drawn == changed).all(-1).mean() > 0.99


@pytest.mark.parametrize(("left", "right", "inked"), [((200, 40, 40), (40, 60, 200), True), ((120,) * 3, (140,) * 3, False)])
def test_ink_is_between_paints_that_differ_much(left, right, inked):
    image = Image.new("RGB", (64, 64), left)
    image.paste(right, (32, 0, 64, 64))
    drawn = np.asarray(cartoon(image)).astype(int).sum(-1)
    line, beside = drawn[:, 30:34].min(1), np.minimum(drawn[:, 8], drawn[:, 56])
    assert ((line < 0.5 * beside) == inked).all()  # at every height: it is closed


def test_any_shape_and_kind_of_image():
    assert cartoon(scene().crop((0, 0, 64, 20))).size == (64, 20)
    assert cartoon(scene().convert("L")).mode == "RGB"
    assert cartoon(Image.new("RGB", (32, 32), "red")).size == (32, 32)
    with pytest.raises(ValueError, match="pixels a side, got 10 x 64"):
        cartoon(Image.new("RGB", (10, 64)))


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"loca-vision\[pairs\]"):
        cartoon(scene())
