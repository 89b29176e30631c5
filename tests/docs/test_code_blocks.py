"""Every code block of the README and of docs/ runs: Python as it stands, over tiny models; commands with short settings."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

import loca_vision.diffusers
from loca_vision import LoCAConfig, inject
from loca_vision.commands.main import main
from loca_vision.formats.lora_writer import write_diffusers_lora
from loca_vision.formats.low_rank_pair import LowRankPair
from support import pipelines as tiny
from support.image_folders import write_oxford_pets

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
READING_ORDER = re.findall(r"^\w+(?:/\w+)?$", (DOCS / "index.md").read_text(), re.MULTILINE)
PAGES = [ROOT / "README.md", DOCS / "index.md", *(DOCS / f"{name}.md" for name in READING_ORDER)]
FENCED = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = {str(page.relative_to(ROOT)): FENCED.findall(page.read_text()) for page in PAGES}
WITH_PYTHON = [page for page, blocks in BLOCKS.items() if any(language == "python" for language, _ in blocks)]
SHELL = [block for blocks in BLOCKS.values() for language, block in blocks if language == "bash"]
COMMANDS = list(dict.fromkeys(line for block in SHELL for line in block.splitlines()))
INSTALLS = [line for line in COMMANDS if line.startswith("python -m pip install")]
EDITED = "--pretrained_model_name_or_path edit-base --resolution 16"
STUDY = "--photographs photos --methods loca --resolution 16 --channels 8 --base_steps 1 --autoencoder_steps 1 --steps 1 "
STUDY += "--n_components 8 --batch_size 2 --crops 1 --num_inference_steps 1"
SHORT_SCRIPTS = {
    "toy_regression.py": "--seeds 1 --steps 20",
    "scales.py": "--base_steps 2 --steps 2 --n_components 20 --batch_size 4",
    "image_classification/train.py": "--model test_vit --weights none --image_size 160 --epochs 1 --batch_size 2",
    "image_classification/evaluate.py": "",
    "image_classification/report.py": "",
    "instruct_pix2pix/build_pairs.py": "--size 16 --crops 1",
    "instruct_pix2pix/train.py": f"{EDITED} --n_components 10 --max_train_steps 2 --train_batch_size 1",
    "instruct_pix2pix/evaluate.py": f"{EDITED} --clip_model None --no_lpips --num_inference_steps 1",
    "instruct_pix2pix/study.py": STUDY,
}
SHORT = ["--model", "test_vit", "--weights", "none", "--image-size", "160", "--steps", "2", "--batch-size", "2"]


def test_every_page_is_in_the_table_of_contents():
    assert set(PAGES) == {ROOT / "README.md", *DOCS.rglob("*.md")}


def test_only_these_languages_are_in_blocks():
    languages = {language for blocks in BLOCKS.values() for language, _ in blocks if not language.startswith("{")}
    assert languages == {"python", "bash", "text", "json"}  # directives of Sphinx begin with a brace


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks(page, tmp_path, monkeypatch):
    """One after the other in one folder and one namespace: a later block loads what an earlier one saved."""
    create = timm.create_model
    small = {"embed_dim": 96, "depth": 1, "num_heads": 3}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kwargs: create(name, **small, **kwargs))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusionInstructPix2PixPipeline, "from_pretrained", lambda name: tiny.instruct_pix2pix())
    for folder in ("user/cartoon-loca", "ink"):
        pipe = tiny.instruct_pix2pix()
        inject(pipe.unet, LoCAConfig(n_components=5))
        loca_vision.diffusers.save_loca_weights(pipe, folder)
    images = torch.randn(2, 3, 224, 224)
    photo = Image.fromarray(np.full((16, 16, 3), 100, np.uint8))
    names = {"loader": [(images, torch.tensor([3, 5]))] * 2, "images": images, "photo": photo}
    for language, block in BLOCKS[page]:
        if language == "python":
            exec(compile(block, page, "exec"), names)
    if "picture" in names:
        assert names["picture"].size == (16, 16)


def test_the_first_page_saves_an_adapter_and_edits_a_photo():
    source = "".join(block for language, block in BLOCKS["README.md"] if language == "python")
    assert 'save_adapter(model, "pets")' in source and "pipe.load_loca_weights(" in source


def test_pictures_of_the_documentation_are_small_and_there():
    pictures = {picture for picture in (ROOT / "docs").rglob("*") if picture.suffix in (".png", ".jpg", ".svg")}
    assert all(picture.stat().st_size <= 300_000 for picture in pictures)
    names = {page: re.findall(r"!\[.*?\]\((.+?)\)", page.read_text(), re.DOTALL) for page in PAGES}
    shown = {(page.parent / name).resolve() for page in PAGES for name in names[page]}
    assert shown <= {picture.resolve() for picture in (ROOT / "docs").rglob("*")}


def test_the_two_commands_are_those_that_ci_runs():
    runs = [line.split(" && ")[1] for line in INSTALLS if " && " in line]
    assert sorted(runs) == ["loca-vision demo", "python -m pytest"]
    assert "grep -E '^python -m pip install" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_other_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for name, value in (("cat", 40), ("dog", 200)):
            for i in range(3):
                folder = tmp_path / "photos" / part / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((40, 60, 3), value + i, np.uint8)).save(folder / f"{i}.png")
    write_fashion(tmp_path / "data" / "FashionMNIST" / "raw")
    write_oxford_pets(tmp_path / "data")
    write_checkpoints()
    tiny.instruct_pix2pix().save_pretrained("edit-base")
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "loca-vision":
            if "--model" in words:
                del words[words.index("--model") : words.index("--model") + 2]
            assert main(words[1:] + (SHORT if words[1] == "demo" else [])) == 0, line
        elif line not in INSTALLS:
            launch = {"python": [], "accelerate": ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]}[words[0]]
            words = [word for word in words[1:] if word != "launch"]
            script = [
                sys.executable,
                *launch,
                str(ROOT / words[0]),
                *words[1:],
                *SHORT_SCRIPTS[words[0].removeprefix("examples/")].split(),
            ]
            done = subprocess.run(script, check=False, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    assert (tmp_path / "scales" / "scales.png").stat().st_size > 0


def write_checkpoints():
    """A LoRA of a pipeline, its UNet's weights, and others, into the working folder."""
    pipe = tiny.stable_diffusion()
    pipe.unet.save_pretrained("unet-base")
    write_diffusers_lora("cartoon-lora", attention_lora(pipe, "unet"))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith("to_v.weight"):
                parameter.add_(0.1)
    pipe.unet.save_pretrained("unet-tuned")


def attention_lora(pipe, component):
    layers = {f"{component}.{p}": m for p, m in getattr(pipe, component).named_modules() if p.endswith(("to_q", "to_v"))}
    return {p: LowRankPair(torch.randn(2, m.in_features), torch.randn(m.out_features, 2)) for p, m in layers.items()}


def write_fashion(raw):
    """Four images in the published layout."""
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = torch.randint(256, (4, 28, 28), dtype=torch.uint8).numpy().tobytes()
        sizes = b"".join(n.to_bytes(4, "big") for n in (4, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (4).to_bytes(4, "big") + bytes([0, 9, 3, 9]))
