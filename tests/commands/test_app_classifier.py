"""The classifier behind the page: its answers are those of the model itself, whatever other requests ask for meanwhile."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from loca_vision import adapters, load_adapter, set_adapters
from loca_vision.commands.app.blocks import block_groups, block_of
from loca_vision.commands.app.classifier import read_classifier
from loca_vision.commands.app.demo_folder import PROBE, read_demo_folder
from loca_vision.data.images import open_image
from loca_vision.recipes.classification.models import ModelSpec, build_model
from loca_vision.recipes.classification.predict import Predict, predict
from loca_vision.recipes.classification.task import view_of
from loca_vision.recipes.classification.trained_weights import TRAINED, load_trained
from support.image_folders import write_folder
from support.scripts import MODEL, main
from support.small_demo import SPEC, write_demo

FILE = "pytorch_loca_weights.safetensors"
PROJECTIONS = [f"blocks.{i}.attn.{part}" for i in range(6) for part in "qv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "loca-demo")


@pytest.fixture(scope="module")
def trained(folder):
    return read_classifier(Predict(str(folder), ()))


def direct(folder, change=lambda model: None):
    """The model as a user of the library builds it, with its adapter; then changed."""
    model = build_model(ModelSpec(**SPEC))
    load_adapter(model, folder)
    change(model)
    return model


def shares(model, image):
    with torch.inference_mode():
        return model(view_of("test_vit", "none", 160).plain(image)[None]).softmax(1)[0]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_the_adapter_answers_as_the_model_does(folder, trained, strength):
    image = trained.examples[3][0]
    wanted = shares(direct(folder, lambda model: set_adapters(model, "default", strength)), image)
    assert torch.allclose(trained.compare(image, strength)[1], wanted, atol=1e-6)


def test_the_base_answers_with_the_head_of_the_linear_probe(folder, trained):
    model = build_model(ModelSpec(**SPEC))
    load_trained(model, folder / PROBE / TRAINED)
    image = trained.examples[7][0]
    base, adapter = trained.compare(image)
    assert torch.allclose(base, shares(model, image), atol=1e-6)
    assert not torch.allclose(base, adapter, atol=1e-3)
    assert trained.base_title == "Base with a linear probe"


def test_groups_of_blocks_have_strengths_of_their_own(folder, trained):
    """The update is linear in its coefficients, which are multiplied here instead."""

    def weaken(model):
        for name, spectrum in adapters(model).items():
            with torch.no_grad():
                spectrum.coefficients.mul_(1.5 * (0.0, 0.5, 2.0)[int(name.split(".")[1]) // 2])

    image = trained.examples[1][0]
    wanted = shares(direct(folder, weaken), image)
    assert torch.allclose(trained.compare(image, 1.5, (0.0, 0.5, 2.0))[1], wanted, atol=1e-5)
    assert not torch.allclose(trained.compare(image, 1.5)[1], wanted, atol=1e-3)


def test_without_a_probe_the_base_takes_the_head_of_the_adapter(folder, tmp_path, trained):
    shutil.copy(folder / FILE, tmp_path / FILE)
    classes = tuple("0123456789")
    alone = read_classifier(Predict(str(tmp_path), (), classes=classes, model="test_vit", image_size=160, weights="none"))
    image = trained.examples[2][0]
    base, adapter = alone.compare(image)
    assert torch.allclose(base, shares(direct(folder, lambda model: set_adapters(model, "default", 0.0)), image), atol=1e-6)
    assert torch.allclose(adapter, trained.compare(image)[1], atol=1e-6)
    assert alone.base_title == "Base with the adapter's head" and alone.examples == ()


def test_a_run_of_train_py(tmp_path):
    """Built and computed as `loca-vision predict` does; a run without an adapter is refused."""
    write_folder(tmp_path / "photos", train=4, test=2)
    flags = ("--dataset", "folder", "--root", tmp_path / "photos", *MODEL, "--workers", 0, "--epochs", 1, "--batch_size", 4)
    assert main("train", *flags, "--n_components", 50, "--lr", "2e-2", "--output_dir", tmp_path / "out") == 0
    image = tmp_path / "photos" / "test" / "red" / "0.png"
    settings = Predict(str(tmp_path / "out"), (image,), top_k=3)
    trained = read_classifier(settings)
    answers = dict(predict(settings)[0].classes)
    shares = dict(zip(trained.classes, trained.compare(open_image(image))[1].tolist(), strict=True))
    assert answers == pytest.approx(shares, abs=1e-5) and not trained.has_probe

    assert main("train", *flags, "--method", "lp", "--output_dir", tmp_path / "lp") == 0
    with pytest.raises(ValueError, match="its run trained no adapter"):
        read_classifier(Predict(str(tmp_path / "lp"), ()))


def test_nothing_of_one_request_reaches_another(trained):
    image = trained.examples[5][0]
    strengths = [0.0, 0.3, 1.0, 2.0]
    alone = {strength: trained.compare(image, strength) for strength in strengths}
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda strength: (strength, trained.compare(image, strength)), strengths * 5))
    assert all(torch.equal(got, want) for strength, pair in answers for got, want in zip(pair, alone[strength], strict=True))
    assert len({tuple(adapter.tolist()) for _, adapter in alone.values()}) == 4


def test_the_demo_leaves_an_example_of_each_class(folder):
    demo = read_demo_folder(folder)
    assert [name for _, name in demo.examples] == list("0123456789")
    assert {image.size for image, _ in demo.examples} == {(8, 8)} and demo.spec == ModelSpec(**SPEC)


def test_the_model_sees_the_whole_picture(trained):
    seen = trained.seen(Image.new("RGB", (8, 8), (200, 100, 50)))
    assert seen.size == (160, 160) and seen.getcolors() == [(160 * 160, (200, 100, 50))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": None}, "its model or its examples are not what the demo writes"),
        ({"examples": [{"file": "examples/../../secret.png", "class": "0"}]}, "expected examples/NAME.png"),
        ({"examples": [{"file": "/etc/passwd", "class": "0"}]}, "expected examples/NAME.png"),
        ({"model": {**SPEC, "seed": 3}}, "its base has random weights of seed 3; expected seed 0"),
    ],
)
def test_what_the_demo_did_not_write_is_refused(folder, tmp_path, change, said):
    shutil.copytree(folder, tmp_path / "other")
    metrics = json.loads((folder / "metrics.json").read_text()) | change
    (tmp_path / "other" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=said):
        read_classifier(Predict(str(tmp_path / "other"), ()))


def test_a_demo_of_an_earlier_version_is_told(folder, tmp_path):
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["model"]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="run loca-vision demo again"):
        read_demo_folder(tmp_path)
    assert read_demo_folder(tmp_path / "elsewhere") is None


def test_a_probe_is_a_head_and_nothing_else(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    shutil.copy(folder / FILE, tmp_path / "other" / PROBE / TRAINED)
    with pytest.raises(ValueError, match="expected the head of a linear probe"):
        read_classifier(Predict(str(tmp_path / "other"), ()))


def test_thirds_of_the_blocks():
    groups = block_groups(PROJECTIONS)
    assert list(groups) == ["Early, 0 to 1", "Middle, 2 to 3", "Late, 4 to 5"]
    assert [name for names in groups.values() for name in names] == PROJECTIONS
    swin = [f"layers.{i}.blocks.{j}.attn.q" for i, depth in enumerate((2, 2, 6, 2)) for j in range(depth)]
    sizes = [len(names) for names in block_groups(swin).values()]
    assert sum(sizes) == 12 and max(sizes) - min(sizes) <= 1
    assert next(iter(block_groups(swin))) == "Early, layers.0.blocks.0 to layers.1.blocks.1"
    assert block_groups(PROJECTIONS[:4]) == {}
    assert block_of("blocks.3.mlp.fc1") == "blocks.3" and block_of("attn_pool.q") == "attn_pool.q"
