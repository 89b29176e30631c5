"""Folders of images with captions in the layouts that trainers know."""

import json

from support.pairs import picture


def write_images(folder, names, first=0):
    """Random pictures, of which number `first` is under the first name."""
    for number, name in enumerate(names, first):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return folder


def write_beside(folder, captions):
    """Pictures with a .txt beside each; `captions` by the names of the images."""
    write_images(folder, captions)
    for name, caption in captions.items():
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


def write_table(folder, captions, **columns):
    """Pictures with metadata.jsonl."""
    write_images(folder, captions)
    rows = [{"file_name": name, "text": caption} | columns for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
