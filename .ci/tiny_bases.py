"""Tiny pipelines and images for a run of the trainers: python .ci/tiny_bases.py FOLDER, with tests/ on the path."""

import json
import sys
from pathlib import Path

from PIL import ImageOps

from support import pipelines as tiny
from support.image_training import photographs
from support.photographs import scene

folder = Path(sys.argv[1])
tiny.small(tiny.stable_diffusion()).save_pretrained(folder / "text_to_image")
tiny.small(tiny.instruct_pix2pix()).save_pretrained(folder / "editing")
photographs(folder / "dog")
for name, turned in (("light", False), ("dark", True)):
    (folder / "classes" / name).mkdir(parents=True)
    for number in range(12):
        image = scene(32).rotate(17 * number)
        (ImageOps.invert(image) if turned else image).save(folder / "classes" / name / f"{number}.png")
(folder / "pairs").mkdir()
rows = []
for number in range(4):
    image = scene(32).rotate(17 * number)
    image.save(folder / "pairs" / f"{number}.png")
    ImageOps.invert(image).save(folder / "pairs" / f"{number}-after.png")
    names = {"input_image_file_name": f"{number}.png", "edited_image_file_name": f"{number}-after.png"}
    rows.append(names | {"edit_prompt": "make it red"})
(folder / "pairs" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
