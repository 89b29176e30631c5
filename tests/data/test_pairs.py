"""Pairs from folders and parquet files: columns, errors in the data, and views of the pairs."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from loca_vision.data.pair_views import Drawn, PairTensors, View, scaled
from loca_vision.data.pairs import CARTOONIZATION, Columns, Pair, Pairs, read_pairs
from support.pairs import Listed, picture

datasets = pytest.importorskip("datasets")


def table(count=5, columns=CARTOONIZATION, **changed):
    rows = {
        columns.original: [picture(i) for i in range(count)],
        columns.prompt: [f"prompt {i}" for i in range(count)],
        columns.edited: [picture(100 + i) for i in range(count)],
    }
    kinds = {columns.original: datasets.Image(), columns.prompt: datasets.Value("string"), columns.edited: datasets.Image()}
    return datasets.Dataset.from_dict(rows | changed, datasets.Features(kinds))


def same(one, other):
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one[:2], other[:2], strict=True)) and (
        one.prompt == other.prompt
    )


@pytest.fixture
def folder(tmp_path):
    """An imagefolder with a training and a test part."""
    for split, numbers in {"train": range(3), "test": range(3, 5)}.items():
        rows = []
        (tmp_path / "set" / split).mkdir(parents=True)
        for i in numbers:
            picture(i).save(tmp_path / "set" / split / f"{i}.png")
            picture(100 + i).save(tmp_path / "set" / split / f"{i}e.png")
            names = {"original_image_file_name": f"{i}.png", "cartoonized_image_file_name": f"{i}e.png"}
            rows.append(names | {"edit_prompt": f"prompt {i}"})
        (tmp_path / "set" / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "set"


def test_an_imagefolder_gives_the_rows_of_its_split_only(folder, tmp_path):
    for split, numbers in {"train": range(3), "test": range(3, 5)}.items():
        pairs = read_pairs(folder, columns=CARTOONIZATION, split=split, cache_dir=tmp_path / "cache")
        assert len(pairs) == len(numbers)
        for pair, i in zip((pairs[k] for k in range(len(pairs))), numbers, strict=True):
            assert same(pair, Pair(picture(i), picture(100 + i), f"prompt {i}"))


def test_parquet_files_alone_and_in_a_folder(tmp_path):
    (tmp_path / "set").mkdir()
    table().to_parquet(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    for source in (tmp_path / "set", tmp_path / "set" / "train-00000-of-00001.parquet"):
        pairs = read_pairs(source, columns=CARTOONIZATION, cache_dir=tmp_path / "cache")
        assert len(pairs) == 5 and same(pairs[4], Pair(picture(4), picture(104), "prompt 4"))


def test_bytes_that_the_file_does_not_call_images(tmp_path):
    import pyarrow
    from pyarrow import parquet

    plain = table().cast_column("original_image", datasets.Image(decode=False)).to_list()
    encoded = [{"bytes": row["original_image"]["bytes"], "path": None} for row in plain]
    columns = {"input_image": encoded, "edit_prompt": ["x"] * 5, "edited_image": [one["bytes"] for one in encoded]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "plain.parquet")
    pairs = read_pairs(tmp_path / "plain.parquet", cache_dir=tmp_path / "cache")
    assert same(pairs[2], Pair(picture(2), picture(2), "x"))


def test_the_default_columns_are_those_of_the_stock_script():
    assert len(Pairs(table(columns=Columns("input_image", "edit_prompt", "edited_image")), Columns(), "x")) == 5


def test_some_of_them_are_drawn_by_the_seed(folder, tmp_path):
    rows = Pairs(table(20), CARTOONIZATION, "x")
    chosen = [[pair.prompt for pair in (rows.some(6, seed)[i] for i in range(6))] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 6
    assert rows.some(None, 0) is rows and rows.some(20, 0) is rows
    assert len(read_pairs(folder, columns=CARTOONIZATION, max_samples=2, cache_dir=tmp_path / "cache")) == 2
    with pytest.raises(ValueError, match="max_samples=0"):
        read_pairs(folder, max_samples=0)


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"original_image_column='original': x has no such column, only .*perhaps original_image"
    ):
        Pairs(table(), Columns("original", "edit_prompt", "cartoonized_image"), "x")
    with pytest.raises(ValueError, match="edited_image_column='edited_image'"):
        Pairs(table(), Columns("original_image"), "x")


def test_a_column_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="the column edit_prompt holds string, not images"):
        Pairs(table(), Columns("edit_prompt", "edit_prompt", "cartoonized_image"), "x")
    with pytest.raises(ValueError, match=r"x: the column original_image holds .*, not texts"):
        Pairs(table(), Columns("original_image", "original_image", "cartoonized_image"), "x")
    identity = Pairs(table(), Columns("original_image", "edit_prompt", "original_image"), "x")[1]
    assert same(identity, Pair(picture(1), picture(1), "prompt 1"))


@pytest.mark.parametrize("text", [None, "", "  "])
def test_a_row_without_text_is_refused_before_training(text):
    with pytest.raises(ValueError, match="x, row 2: there is no text in edit_prompt"):
        Pairs(table(edit_prompt=["a", "b", text, "d", "e"]), CARTOONIZATION, "x")


def test_a_row_without_an_image_and_a_broken_one_are_named():
    data = [picture(i) for i in range(5)]
    pairs = Pairs(table(cartoonized_image=[*data[:3], None, data[4]]), CARTOONIZATION, "x")
    with pytest.raises(ValueError, match="x, row 3: there is no image in cartoonized_image"):
        pairs[3]
    broken = table().cast_column("original_image", datasets.Image(decode=False))
    rows = [
        row | ({"original_image": {"bytes": b"\x89PNG no", "path": None}} if i == 1 else {}) for i, row in enumerate(broken)
    ]
    pairs = Pairs(datasets.Dataset.from_list(rows, table().features), CARTOONIZATION, "x")
    with pytest.raises(ValueError, match="x, row 1, original_image: it cannot be read as an image"):
        pairs[1]
    assert pairs[0].prompt == "prompt 0"


def test_an_image_that_would_fill_the_memory_is_named():
    lines = [Image.new("RGB", size) for size in ((100, 1), (101, 1), (1, 300), (8, 8), (8, 8))]
    pairs = Pairs(table(original_image=lines), CARTOONIZATION, "x")
    assert pairs[0].original.size == (100, 1)
    with pytest.raises(ValueError, match="x, row 2, original_image: 1 x 300 pixels: one side is over 100 times the other"):
        pairs[2]


def test_what_is_not_there_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for source, sentence in (
        (tmp_path / "empty", "got a folder without any"),
        (tmp_path / "missing", "there is no such folder or file"),
        (tmp_path / "bad.parquet", "cannot be read as a data set"),
        ("nobody/nothing-of-that-name", "cannot be read as a data set"),
    ):
        with pytest.raises(OSError, match=sentence) as caught:
            read_pairs(source, cache_dir=tmp_path / "cache")
        assert str(source) in str(caught.value) and "\n" not in str(caught.value)


def test_a_configuration_on_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda source, **more: asked.append((source, more)) or table())
    assert len(read_pairs("user/set", columns=CARTOONIZATION, config="large", revision="main")) == 5
    assert asked == [("user/set", {"revision": "main", "name": "large", "split": "train", "cache_dir": None})]
    with pytest.raises(ValueError, match=r"dataset_config_name='large': .* is on this machine"):
        read_pairs(tmp_path, config="large")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"loca-vision\[train\]"):
        read_pairs("user/set")


# Views


def coordinates(width, height):
    """An image whose pixels say where they are."""
    rows, cols = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([cols, rows, 0 * rows], -1).astype(np.uint8))


def test_both_images_are_cropped_and_mirrored_alike():
    view = View(8, crop="random", flip=True)
    pair, seen = Pair(coordinates(8, 20), coordinates(8, 20), "x"), set()
    for index in range(40):
        original, edited = view.pixels(pair, view.drawn(0, 0, index))
        assert original.shape == (3, 8, 8) and original.dtype == torch.uint8 and torch.equal(original, edited)
        across, down = original[0, 0].tolist(), original[1, :, 0].tolist()
        assert across in (list(range(8)), list(range(8))[::-1]) and down == list(range(down[0], down[0] + 8))
        seen.add((across[0] == 0, down[0]))
    assert {flipped for flipped, _ in seen} == {True, False} and {top for _, top in seen} == set(range(13))


def test_each_image_is_its_own():
    pair, view = Pair(picture(0, (8, 8)), picture(1, (8, 8)), "x"), View(8)
    for pixels, image in zip(view.pixels(pair, Drawn()), pair[:2], strict=True):
        assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(np.array(image)))
    item = PairTensors(Listed([pair]), view, 0)[0]
    assert torch.equal(item["edited"], scaled(view.pixels(pair, Drawn())[1])) and item["prompt"] == "x"


def test_a_view_is_a_function_of_seed_epoch_and_index():
    view = View(8, crop="random", flip=True)
    draws = [view.drawn(*keys) for keys in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len(set(draws)) == 4 and view.drawn(0, 0, 0) == draws[0]
    state = torch.get_rng_state()
    items = Listed([Pair(picture(i, (20, 10)), picture(9 + i, (20, 10)), str(i)) for i in range(6)])
    data = PairTensors(items, View(8, crop="random", flip=True), 5)
    data.set_epoch(2)
    first = [data[i]["edited"] for i in range(6)]
    data.set_epoch(3)
    assert not all(torch.equal(data[i]["edited"], first[i]) for i in range(6))
    data.set_epoch(2)
    loader = DataLoader(data, 2, num_workers=2, generator=torch.Generator())
    batches = list(loader)
    assert torch.equal(torch.cat([batch["edited"] for batch in batches]), torch.stack(first))
    assert [text for batch in batches for text in batch["prompt"]] == list("012345")
    assert torch.equal(torch.get_rng_state(), state)


def test_all_lists_every_view_that_can_be_cached():
    assert View(8).all == (Drawn(),)
    assert {View(8, flip=True).drawn(0, 0, i) for i in range(50)} == set(View(8, flip=True).all) and len(
        View(8, flip=True).all
    ) == 2
    assert View(8, crop="random").all == ()


def test_sizes_follow_the_original_and_numbers_are_in_range():
    pair = Pair(picture(0, (31, 20)), picture(1, (9, 30)), "x")
    for crop in ("center", "random"):
        view = View(16, crop=crop)
        assert view.pixels(pair, view.drawn(0, 0, 0)).shape == (2, 3, 16, 16)
    item = PairTensors(Listed([pair]), View(16), 0)[0]
    assert item["original"].dtype == torch.float32 and -1 <= item["edited"].min() < item["edited"].max() <= 1
    assert scaled(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    same_size = Pair(picture(0, (16, 16)), picture(1, (16, 16)), "x")
    assert torch.equal(View(16).pixels(same_size, Drawn())[0].permute(1, 2, 0), torch.from_numpy(np.array(same_size.original)))


def test_a_wrong_view_is_refused():
    with pytest.raises(ValueError, match="size=0"):
        View(0)
    with pytest.raises(ValueError, match="crop='middle'"):
        View(8, crop="middle")


def in_a_folder(folder, image, name="0.png", **settings):
    """The pairs of an imagefolder with one row, of which both images are this one."""
    (folder / "set").mkdir()
    image.save(folder / "set" / name, **settings)
    row = {"input_image_file_name": name, "edited_image_file_name": name, "edit_prompt": "x"}
    (folder / "set" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    return read_pairs(folder / "set", cache_dir=folder / "cache")


def test_a_camera_that_was_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (pair,) = in_a_folder(tmp_path, picture(0), exif=exif)
    assert all(np.array_equal(np.asarray(image), np.rot90(np.asarray(picture(0)), -1)) for image in pair[:2])


def test_grey_of_sixteen_bits_is_not_white(tmp_path):
    grey = np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16)
    (pair,) = in_a_folder(tmp_path, Image.fromarray(grey))
    assert np.array_equal(np.asarray(pair.original), np.repeat((grey // 256).astype(np.uint8)[..., None], 3, 2))


def test_a_palette_with_transparency_has_its_colours(tmp_path):
    paletted = picture(0).convert("P")
    (pair,) = in_a_folder(tmp_path, paletted, transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(pair.original), np.asarray(paletted.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "CMYK"])
def test_any_other_kind_is_as_diffusers_loads_it(mode, tmp_path):
    from diffusers.utils import load_image

    image = picture(0).convert(mode)
    image.putalpha(picture(1).convert("L")) if mode in ("RGBA", "LA") else None
    name = "0.tiff" if mode == "CMYK" else "0.png"
    (pair,) = in_a_folder(tmp_path, image, name)
    assert np.array_equal(np.asarray(pair.edited), np.asarray(load_image(str(tmp_path / "set" / name))))


def test_grey_of_thirty_two_bits_is_refused(tmp_path):
    pairs = in_a_folder(tmp_path, Image.fromarray(np.linspace(0, 1, 96, dtype=np.float32).reshape(8, 12)), "0.tiff")
    with pytest.raises(ValueError, match=r"\(train\), row 0, input_image \(0.tiff\): expected 8 or 16 bits a channel"):
        pairs[0]
