"""Class images: which are there, which are missing, and how the missing ones are kept."""

import numpy as np
import pytest
from PIL import Image

from loca_vision.data.captions import read_captioned
from loca_vision.data.class_images import class_images
from support.captioned import write_images
from support.pairs import picture


def test_a_folder_that_is_not_there_lacks_all(tmp_path):
    found = class_images(tmp_path / "new" / "dogs", 3)
    assert found.there == () and found.missing == (0, 1, 2)
    assert not (tmp_path / "new").exists(), "until an image is written"
    file = found.write(2, picture(0))
    assert file == tmp_path / "new" / "dogs" / "class-00002.png"
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(picture(0)))
    after = class_images(tmp_path / "new" / "dogs", 3)
    assert after.there == (file,) and after.missing == (0, 1)


def test_images_of_all_names_count(tmp_path):
    write_images(tmp_path, ["my dog.jpg", "more/class-00000.png", "b.webp"])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".class-00000.png.tmp").write_text("x")
    found = class_images(str(tmp_path), 5)
    assert [file.name for file in found.there] == ["b.webp", "class-00000.png", "my dog.jpg"]
    assert found.missing == (0, 1)
    for wanted in (1, 2, 3):
        assert class_images(tmp_path, wanted).missing == () and len(class_images(tmp_path, wanted).there) == 3


def test_an_interruption_makes_the_same_images_as_none(tmp_path):
    write_images(tmp_path / "one", ["a.png", "b.png"])
    write_images(tmp_path / "two", ["a.png", "b.png"])
    for number in class_images(tmp_path / "one", 6).missing:
        class_images(tmp_path / "one", 6).write(number, picture(number))
    while (found := class_images(tmp_path / "two", 6)).missing:
        found.write(found.missing[-1 if len(found.missing) % 2 else 0], picture(found.missing[0]))
    names = [sorted(file.name for file in (tmp_path / folder).iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1] == ["a.png", "b.png", *(f"class-{number:05d}.png" for number in range(4))]


def test_a_removed_image_is_made_again(tmp_path):
    found = class_images(tmp_path, 4)
    for number in found.missing:
        found.write(number, picture(number))
    (tmp_path / "class-00001.png").unlink()
    assert class_images(tmp_path, 4).missing == (1,)
    assert class_images(tmp_path, 6).missing == (1, 4, 5)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loca_vision.storage.atomic_file.write_synced", fails)
    with pytest.raises(OSError, match=r"class-00000\.png: it could not be written \(No space left"):
        class_images(tmp_path, 1).write(0, picture(0))
    assert list(tmp_path.iterdir()) == []


def test_they_are_read_with_one_caption(tmp_path):
    found = class_images(tmp_path, 2)
    for number in found.missing:
        found.write(number, picture(number))
    there = read_captioned(tmp_path, caption="a photo of a dog")
    assert there.captions == ["a photo of a dog"] * 2 and there.sizes == [(12, 8)] * 2


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match="wanted=0: expected a whole number from 1 up"):
        class_images(tmp_path, 0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file: expected a folder of class images, got a file"):
        class_images(tmp_path / "file", 1)
    with pytest.raises(ValueError, match=r"number=2: it is not one of the 2 images that .* lacks"):
        class_images(tmp_path / "new", 2).write(2, picture(0))
