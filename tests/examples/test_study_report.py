"""The study on tiny settings: all of its scripts in order, and nothing is computed twice."""

import json

import pytest
from PIL import Image

from loca_vision import KINDS
from loca_vision.data.photographs import photographs_in
from loca_vision.recipes.reports import plots
from loca_vision.recipes.reports.metrics import METRICS
from support.photographs import photograph
from support.scripts import main, script

pytest.importorskip("cv2")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")
SMALL = ["--resolution", "16", "--channels", "8", "--base_steps", "2", "--autoencoder_steps", "2", "--steps", "2"]
SMALL += ["--n_components", "8", "--rank", "1", "--batch_size", "2", "--crops", "1", "--num_inference_steps", "1"]


@pytest.fixture
def study(monkeypatch):
    """The script, whose steps run in this process; and the steps that were run."""
    module, ran = script("instruct_pix2pix/study"), []

    def here(name, arguments, told):
        ran.append((name, dict(told)))
        flags = [word for flag, value in told.items() for word in (f"--{flag}", *module._words(value))]
        if main(f"instruct_pix2pix/{name.removesuffix('.py')}", *arguments, *flags):
            raise ValueError(name)

    monkeypatch.setattr(module, "_run", here)
    return module, ran


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        photograph(folder / f"{number}.png", number)
    return folder


def test_from_photographs_to_a_table_and_again(study, photos, tmp_path, capsys):
    module, ran = study
    out = tmp_path / "study"
    command = [str(out), "--photographs", str(photos), *SMALL, "--methods", "loca", "lora", "--targets", "q", "fc1", "proj_in"]
    assert module.main(command) == 0
    names = [name for name, _ in ran]
    assert names == ["build_pairs.py", "pretrain.py", "train.py", "train.py", "evaluate.py"]
    adapted = json.loads((out / "adapters" / "lora" / METRICS).read_text())["config"]["targets"]
    assert adapted == ["q", "fc1", "proj_in"]
    results = json.loads((out / "results.json").read_text())
    arms = {arm["name"]: arm for arm in results["results"]}
    assert list(arms) == ["photograph", "base", "loca", "lora"] and results["test_pairs"] >= 1
    assert arms["loca"]["trained"] > 0 == arms["base"]["trained"] and arms["lora"]["size"] > 0
    table = (out / "study.md").read_text()
    assert f"{arms['loca']['measured']['psnr_to_target']:.2f}" in table and table in capsys.readouterr().out
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    each = [entry["measures"] for entry in evaluation["photographs"]]
    gains = [found["loca at 1"]["psnr_to_target"] - found["base"]["psnr_to_target"] for found in each]
    assert arms["loca"]["gain"] == pytest.approx(sorted(gains)[len(gains) // 2]) or len(gains) % 2 == 0
    assert arms["loca"]["nearer"] == sum(gain > 0 for gain in gains) / len(gains)
    for picture in ("study.png", "numbers.png"):
        with Image.open(out / picture) as image:
            image.verify()
    shown = {one.content for one in photographs_in(out / "photographs" / "train")}
    assert shown and not shown & {one.content for one in photographs_in(out / "photographs" / "test")}
    ran.clear()
    before = (out / "results.json").read_bytes()
    assert module.main(command) == 0
    assert [name for name, _ in ran] == ["build_pairs.py", "pretrain.py"]  # which see for themselves that all is there
    assert (out / "results.json").read_bytes() == before
    assert module.main([*command, "--steps", "3"]) == 2
    assert "steps=2, not 3" in capsys.readouterr().err


def test_rates_are_chosen_on_validation(study, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, path: path.write_bytes(b""))  # nobody looks at the figures
    module, ran = study
    assert module.main([str(tmp_path), "--photographs", str(photos), *SMALL, "--methods", "lora", "--tune"]) == 0
    rates = [told["learning_rate"] for name, told in ran if name == "train.py"]
    assert rates == sorted(rates) and len(rates) == 3 and rates[1] == KINDS["lora"].edit_lr
    splits = [told["split"] for name, told in ran if name == "evaluate.py"]
    assert splits == ["validation"] * 3 + ["test"]
    tried = {
        rate: json.loads((tmp_path / "tuning" / f"lora-{rate:g}" / "validation" / "evaluation.json").read_text())["means"]
        for rate in rates
    }
    best = max(rates, key=lambda rate: tried[rate]["lora at 1"]["psnr_to_target"]["mean"])
    (arm,) = [arm for arm in json.loads((tmp_path / "results.json").read_text())["results"] if arm["name"] == "lora"]
    assert arm["rate"] == best


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--methods", "lora", "lora"], "none twice"),
        (["--resolution", "20"], "multiple of 8"),
        (["--steps", "0"], "steps=0"),
        (["--test_share", "1"], "test_share=1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(study, photos, tmp_path, capsys, flags, sentence):
    module, ran = study
    assert module.main([str(tmp_path / "out"), "--photographs", str(photos), *SMALL, *flags]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not ran and not (tmp_path / "out").exists()


def test_a_step_that_fails_ends_the_study_in_one_line(photos, tmp_path, capfd):
    module = script("instruct_pix2pix/study")
    with pytest.raises(ValueError, match=r"build_pairs\.py: it ended with status 2"):
        module._run("build_pairs.py", [str(tmp_path / "none"), str(tmp_path / "pairs")], {"size": 16})
    assert "no such folder" in capfd.readouterr().err


def test_installed_photographs_are_of_packages_and_wallpapers(tmp_path, monkeypatch):
    module = script("instruct_pix2pix/study")
    for package, (folder, names) in module.BUNDLED.items():
        monkeypatch.syspath_prepend(str(tmp_path))
        for number, name in enumerate(names[:2]):
            photograph(tmp_path / package / folder / name, number + len(package) + 10 * (package == "sklearn"))
    monkeypatch.setattr(module, "find_spec", lambda name: _Spec([str(tmp_path / name)]))
    monkeypatch.setattr(module, "WALLPAPERS", tmp_path / "backgrounds")
    assert len(module.installed()) == 4
    photograph(tmp_path / "backgrounds" / "deep" / "one.jpg", 33)
    Image.linear_gradient("L").save(tmp_path / "backgrounds" / "gradient.jpg")
    names = {one.file.name for one in module.installed()}
    assert len(names) == 5 and "one.jpg" in names
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="scikit-image"):
        module.installed()


class _Spec:
    def __init__(self, places):
        self.submodule_search_locations = places


def test_of_a_wallpaper_in_several_sizes_one_is_taken(study, monkeypatch, tmp_path):
    """Or a photograph to test on would have been trained on."""
    module, _ = study
    for number, name in enumerate(["lake.jpg", "lake_64x48.jpg", "lake_32x32.jpg", "sea.jpg", "deep/hill.jpg"]):
        photograph(tmp_path / name, number)
    monkeypatch.setattr(module, "WALLPAPERS", tmp_path)
    monkeypatch.setattr(module, "BUNDLED", {})
    stems = sorted(one.file.stem.split("_")[0] for one in module.installed())
    assert stems == ["hill", "lake", "sea"]
