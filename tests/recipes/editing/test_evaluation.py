"""The evaluation of edits: its numbers match its pictures, its pictures match the pipeline, and it resumes."""

import importlib.util
import json
import shutil
import statistics
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import loca_vision.recipes.editing.evaluation.editors
from loca_vision import LoCAConfig, LoRAConfig, adapters, inject
from loca_vision.data.pair_views import Drawn, View
from loca_vision.data.pairs import CARTOONIZATION, read_pairs
from loca_vision.pipeline.loader import LoCALoaderMixin as Loca
from loca_vision.recipes.editing.edit import Sampling, edit, read_photograph, square
from loca_vision.recipes.editing.evaluation.editors import columns_of, named
from loca_vision.recipes.editing.evaluation.evaluate import table
from loca_vision.recipes.reports.image_quality import Clip, psnr, similarity, ssim
from support import pipelines as tiny
from support.clip import write_tiny_clip
from support.photographs import scene
from support.timm_models import randomise

pytest.importorskip("datasets")
SCRIPT = Path(__file__).parents[3] / "examples" / "instruct_pix2pix" / "evaluate.py"
QUICK = ("--resolution", "16", "--num_inference_steps", "2")
PROMPT = ("--prompt", "make it red")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("instruct_pix2pix_evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_pairs(folder):
    """Four pairs as build_pairs.py lays them out, one of them twice."""
    rows = []
    for number in (0, 1, 2, 2):
        for what, image in (("original", scene(40).rotate(30 * number)), ("cartoon", scene(40).rotate(30 * number + 15))):
            folder.mkdir(parents=True, exist_ok=True)
            image.resize((40, 30)).save(folder / f"{number}-{what}.png")
        names = {"original_image_file_name": f"{number}-original.png", "cartoonized_image_file_name": f"{number}-cartoon.png"}
        rows.append(names | {"edit_prompt": "make it red" if number else "a cartoon of it"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, two adapters, a folder of photographs, pairs and a CLIP model, as a user has them."""
    folder = tmp_path_factory.mktemp("world")
    tiny.small(tiny.instruct_pix2pix()).save_pretrained(folder / "base")
    for name, config in {
        "cartoon": LoCAConfig(n_components=6, targets=("q", "k", "v", "out")),
        "cartoon-lora": LoRAConfig(r=2, alpha=2.0, targets=("q", "v")),
    }.items():
        pipe = tiny.small(tiny.instruct_pix2pix())
        inject(pipe.unet, config, name="default")
        if name == "cartoon":
            randomise(pipe.unet)
        else:
            torch.manual_seed(1)
            for update in adapters(pipe.unet).values():
                for parameter in update.parameters():
                    torch.nn.init.normal_(parameter)
        Loca.save_loca_weights(pipe, folder / name)
    for number in range(3):
        (folder / "photos" / "deep").mkdir(parents=True, exist_ok=True)
        scene(40).rotate(25 * number).crop((0, 0, 40, 30)).save(
            folder / "photos" / ("deep" if number else ".") / f"{number}.png"
        )
    write_pairs(folder / "pairs" / "test")
    write_tiny_clip(folder / "clip")
    return folder


@pytest.fixture
def run(script, world, tmp_path, monkeypatch, capsys):
    """Call the script from the world's folder, with all that a test does not say; its JSON, or the line it leaves."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def called(*more, out=tmp_path / "out", base="base", status=0):
        given = [
            "--pretrained_model_name_or_path",
            str(base),
            "--adapter",
            "cartoon",
            "--clip_model",
            "clip",
            "--device",
            "cpu",
        ]
        found = script.main([*given, "--device", "cpu", *QUICK, "--output_dir", str(out), *map(str, more)])
        said = capsys.readouterr()
        assert found == status, said.err
        if status:
            return said.err.strip().splitlines()[-1]
        called.said = said.out
        return json.loads((out / "evaluation.json").read_text())

    return called


def pixels_of(image):
    return np.asarray(image.convert("RGB"), np.float64)


def test_edits_of_photographs_are_those_of_the_pipeline(run, world, tmp_path):
    found = run("--photographs", "photos", *PROMPT, "--other", "cartoon-lora", "--scales", "0", "0.5", "1")
    titles = ["base", "cartoon at 0", "cartoon at 0.5", "cartoon at 1", "cartoon-lora"]
    assert sorted(one["label"] for one in found["photographs"]) == ["0.png", "deep/1.png", "deep/2.png"]
    assert len({one["seed"] for one in found["photographs"]}) == 3
    for one in found["photographs"]:
        photo = square(read_photograph(world / "photos" / one["label"]), 16)
        for title, (adapter, weight) in zip(
            titles, [(None, 0), ("cartoon", 0.0), ("cartoon", 0.5), ("cartoon", 1.0), ("cartoon-lora", 1.0)], strict=True
        ):
            pipe = tiny.small(tiny.instruct_pix2pix())
            if adapter:
                Loca.load_loca_weights(pipe, world / adapter)
            wanted = edit(pipe, photo, "make it red", Sampling(2), seed=one["seed"], scale=weight)
            with Image.open(tmp_path / "out" / one["edits"][title]) as made:
                assert made.size == (16, 16) and np.abs(pixels_of(made) - pixels_of(wanted)).max() <= 1
        base, none = (tmp_path / "out" / one["edits"][title] for title in titles[:2])
        assert base.read_bytes() == none.read_bytes()
    assert len(list((tmp_path / "out" / "edits").iterdir())) == 15
    assert list(found["means"]) == ["photograph", *titles]
    assert not any("target" in name for measures in found["means"].values() for name in measures)


def test_numbers_are_those_of_the_pictures(run, world, tmp_path):
    found = run("--pairs", "pairs")
    pairs = read_pairs(world / "pairs", columns=CARTOONIZATION, split="test", cache_dir=tmp_path / "other")
    assert len(pairs) == 4 and len(found["photographs"]) == 3  # one was there twice
    clip, every = Clip(world / "clip"), []
    for one in found["photographs"]:
        pair = next(pair for pair in pairs if similar(pair, one))
        shown = View(16).pixels(pair, Drawn()).permute(0, 2, 3, 1).numpy()
        pictures = {"photograph": Image.fromarray(shown[0]), "target": Image.fromarray(shown[1])}
        for title, file in one["edits"].items():
            with Image.open(tmp_path / "out" / file) as made:
                pictures[title] = made.convert("RGB")
        for title, picture in pictures.items():
            wanted = {}
            for name in ("photograph", "target"):
                if name != title:
                    wanted |= {f"psnr_to_{name}": psnr(picture, pictures[name]), f"lpips_to_{name}": None}
                    wanted[f"ssim_to_{name}"] = ssim(picture, pictures[name])
                    wanted[f"clip_to_{name}"] = similarity(clip.image(picture), clip.image(pictures[name]))
            wanted["clip_to_prompt"] = similarity(clip.image(picture), clip.text(one["prompt"]))
            assert one["measures"][title] == pytest.approx(wanted)
        every.append(one["measures"])
    for title, measures in found["means"].items():
        for name, mean in measures.items():
            values = [one[title][name] for one in every if one[title][name] is not None]
            if name.startswith("lpips"):
                assert mean == {"mean": None, "std": None, "photographs": 0}
            else:
                assert mean["mean"] == pytest.approx(np.mean(values)) and mean["std"] == pytest.approx(statistics.stdev(values))
                assert mean["photographs"] == 3
    assert found["unavailable"] == {"lpips": "AlexNet needs 64 pixels a side, and there are 16"}
    assert "lpips is not measured: AlexNet needs 64 pixels a side" in run.said and "psnr to target" in run.said


def similar(pair, one):
    """Whether a pair is the one of an entry: by pixels and text."""
    digest = sha256(pair.prompt.encode())
    for image in (pair.original, pair.edited):
        digest.update(f" {image.size} ".encode() + np.asarray(image).tobytes())
    return digest.hexdigest().startswith(one["name"])


def test_facts_about_adapters(run, world):
    found = run("--photographs", "photos", *PROMPT, "--other", "cartoon-lora", "--max_photographs", "1")
    cartoon, lora = found["adapters"]["cartoon"], found["adapters"]["cartoon-lora"]
    assert cartoon["methods"] == ["loca"] and lora["methods"] == ["lora"]
    assert cartoon["trained_numbers"] == 6 * 16 and cartoon["trained_whole"] == 0
    assert cartoon["bytes"] == (world / "cartoon" / "pytorch_loca_weights.safetensors").stat().st_size
    assert len(found["photographs"]) == 1 and found["environment"]["torch"] == torch.__version__
    assert found["means"]["base"]["psnr_to_photograph"]["std"] is None


def test_a_conv_in_of_the_adapter_is_in_its_columns_alone(run, world, tmp_path):
    pipe = tiny.small(tiny.instruct_pix2pix())
    inject(pipe.unet, LoCAConfig(n_components=6))
    pipe.unet.conv_in.requires_grad_(True)
    with torch.no_grad():
        pipe.unet.conv_in.weight.add_(0.3)
    Loca.save_loca_weights(pipe, tmp_path / "wide")
    asked = ("--photographs", "photos", *PROMPT, "--max_photographs", 1)
    (one,) = run(*asked, "--other", tmp_path / "wide")["photographs"]
    (alone,) = run(*asked, out=tmp_path / "alone")["photographs"]
    for title in ("base", "cartoon at 0.5", "cartoon at 1"):
        assert (tmp_path / "out" / one["edits"][title]).read_bytes() == (
            tmp_path / "alone" / alone["edits"][title]
        ).read_bytes()
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    conv = pipe.unet.conv_in
    assert found["adapters"]["wide"]["trained_whole"] == conv.weight.numel() + conv.bias.numel()
    assert one["measures"]["wide"] != one["measures"]["base"]


def test_a_seed_does_not_depend_on_what_else_is_there(run, world, tmp_path):
    shutil.copytree(world / "photos" / "deep", tmp_path / "fewer")
    all_of, fewer = (
        run("--photographs", "photos", *PROMPT),
        run("--photographs", tmp_path / "fewer", *PROMPT, out=tmp_path / "o"),
    )
    seeds = {one["name"]: one["seed"] for one in all_of["photographs"]}
    assert len(fewer["photographs"]) == 2 and all(seeds[one["name"]] == one["seed"] for one in fewer["photographs"])
    other = run("--photographs", "photos", *PROMPT, "--seed", 1, out=tmp_path / "p")
    assert not set(seeds.values()) & {one["seed"] for one in other["photographs"]}


def test_resumed_equals_uninterrupted(run, tmp_path, monkeypatch):
    asked, out = ("--pairs", "pairs", "--other", "cartoon-lora"), tmp_path / "out"
    run(*asked)
    whole = {file.relative_to(out): file.read_bytes() for file in out.rglob("*.*")}
    shutil.rmtree(out)
    made, genuine = [], loca_vision.recipes.editing.evaluation.editors.edit

    def counted(*given, **more):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(more["seed"])
        return genuine(*given, **more)

    monkeypatch.setattr(loca_vision.recipes.editing.evaluation.editors, "edit", counted)
    assert "interrupted; every file that is there is whole" in run(*asked, status=130)
    assert len(list((out / "edits").iterdir())) == 5 and not (out / "evaluation.json").exists()
    made.append("so that none stops it")
    run(*asked)
    assert {file.relative_to(out): file.read_bytes() for file in out.rglob("*.*")} == whole
    assert len(made) == 1 + 3 * 4  # none was made again


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "say what to edit: either --photographs, a folder, or --pairs, a data set"),
        (["--photographs", "photos", "--pairs", "pairs"], "say what to edit: either"),
        (["--photographs", "photos"], "--photographs need an instruction: say --prompt"),
        (["--photographs", "photos", "--prompt", " "], "prompt must be an instruction"),
        (["--photographs", "photos", *PROMPT, "--split", "test"], "--split is a setting of --pairs"),
        (["--photographs", "nowhere", *PROMPT], "nowhere: there is no such folder of photographs"),
        (["--photographs", "photos", *PROMPT, "--resolution", "12"], "resolution=12: expected a multiple of 8 from 16 up"),
        (["--photographs", "photos", *PROMPT, "--scales", "1", "1.0"], "one comes twice"),
        (["--photographs", "photos", *PROMPT, "--scales", "nan"], "scales must be finite numbers, at least one"),
        (
            ["--photographs", "photos", *PROMPT, "--guidance_scale", "0"],
            "guidance_scale=0.0: expected a finite number from 1",
        ),
        (["--photographs", "photos", *PROMPT, "--num_inference_steps", "0"], "steps=0: expected a whole number from 1 up"),
        (["--photographs", "photos", *PROMPT, "--max_photographs", "0"], "max_photographs=0"),
        (["--photographs", "photos", *PROMPT, "--seed", "-1"], "seed=-1"),
        (["--photographs", "photos", *PROMPT, "--device", "abacus"], "device='abacus': expected auto, cpu, cuda"),
        (["--photographs", "photos", *PROMPT, "--dtype", "fp16"], "dtype='fp16': it is for GPUs"),
        (["--photographs", "photos", *PROMPT, "--adapter", "nowhere"], "nowhere: there is no such file or folder"),
        (
            ["--photographs", "photos", *PROMPT, "--other", "photos"],
            "there is no pytorch_loca_weights.safetensors in",
        ),
        (["--pairs", "pairs", "--split", "train"], "pairs: 'train' cannot be read as a data set"),
        (["--pairs", "pairs", "--edit_prompt_column", "prompt"], "edit_prompt_column='prompt'"),
        (["--colour", "red"], "colour"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(run, tmp_path, more, sentence):
    said = run(*more, status=2)
    assert said.startswith("evaluate.py: ") and sentence in said and not (tmp_path / "out").exists()


def test_a_base_that_is_none(run, tmp_path):
    asked = ("--photographs", "photos", *PROMPT)
    assert "photos: it cannot be loaded as a pipeline of InstructPix2Pix" in run(*asked, base="photos", status=2)
    assert not (tmp_path / "out").exists()


def test_a_base_that_takes_no_photographs(run, tmp_path):
    pipe = tiny.small(tiny.instruct_pix2pix())
    pipe.unet = tiny.small_unet()
    pipe.save_pretrained(tmp_path / "plain")
    said = run("--photographs", "photos", *PROMPT, base=tmp_path / "plain", status=2)
    assert "its UNet takes 4 channels, and to edit photographs it takes 8" in said and not (tmp_path / "out").exists()


def test_other_settings_are_refused_and_other_measures_are_not(run, tmp_path):
    asked = ("--photographs", "photos", *PROMPT)
    run(*asked, "--max_photographs", 1)
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "edits").iterdir()}
    assert len(first) == 3 and len(run(*asked)["photographs"]) == 3  # more of them are no other settings
    assert all(file.stat().st_mtime_ns == when for file, when in first.items())
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.png")}
    assert "the edits there were made with seed=0, not 1; choose another folder" in run(*asked, "--seed", 1, status=2)
    assert "were made with adapters=" in run(*asked, "--adapter", "cartoon-lora", status=2)
    found = run(*asked, "--clip_model", "None", "--no_lpips")
    assert found["unavailable"] == {"lpips": "it was not asked for", "clip": "no model was named"}
    assert found["means"]["base"]["clip_to_prompt"]["mean"] is None
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.png")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    assert "something else is there" in run(*asked, out=tmp_path / "mine", status=2)


def test_settings_from_a_file(run, tmp_path):
    (tmp_path / "e.yaml").write_text("photographs: photos\nprompt: make it red\nscales: [1]\nmax_photographs: 1\n")
    found = run("--config", tmp_path / "e.yaml")
    assert list(found["means"]) == ["photograph", "base", "cartoon at 1"]
    (tmp_path / "e.yaml").write_text("photograph: photos\n")
    assert "'photograph' is not a setting; perhaps photographs" in run("--config", tmp_path / "e.yaml", status=2)


def test_what_cannot_be_had_is_said(run):
    found = run("--photographs", "photos", *PROMPT, "--clip_model", "nobody/no-model")
    assert "nobody/no-model: it cannot be read as a CLIP model" in found["unavailable"]["clip"]
    assert "clip is not measured: nobody/no-model" in run.said
    assert found["photographs"][0]["measures"]["base"]["clip_to_prompt"] is None


def test_the_table_leaves_out_what_is_not_measured():
    def mean(value):
        return {"mean": value, "std": None, "photographs": 1}

    base = {"psnr_to_photograph": mean(12.345), "lpips_to_photograph": mean(None), "clip_to_prompt": mean(0.25)}
    lines = table({"photograph": {"clip_to_prompt": mean(0.5)}, "base": base}).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["", "photograph", "base"]
    assert lines[0].split() == ["psnr", "to", "photograph", "clip", "to", "prompt"]
    assert [line.split()[1:] for line in lines[1:]] == [["-", "0.5"], ["12.35", "0.25"]]


def test_names_of_adapters(tmp_path):
    file = tmp_path / "one" / "pytorch_loca_weights.safetensors"
    given = ["user/cartoon-loca", "runs/a/final", "runs/b/final", "ink.v2.safetensors", str(file), "base", "final-2", "final"]
    names = ["cartoon-loca", "final", "final-2", "ink-v2", "one", "base-adapter", "final-2-2", "final-3"]
    assert named(given) == dict(zip(names, given, strict=True))
    titles = [column.title for column in columns_of("a", ["b"], (0.5, 1.0))]
    assert titles == ["base", "a at 0.5", "a at 1", "b"] and columns_of("a", [], (1.0,))[1].file_title == "a@1"
