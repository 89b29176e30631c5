"""train-image: what is refused in one sentence, before anything is written."""

import json
import shutil

import pytest

from loca_vision.commands.main import main as command
from support.image_training import FEW, PRIOR, SHORT, photographs, run, trained

REFUSED = {
    "no images": ((), "--dataset_name, --train_data_dir or --instance_data_dir says where the images are; nothing was given"),
    "two places": (
        ("--train_data_dir", "a", "--dataset_name", "b"),
        "--dataset_name and --train_data_dir was given",
    ),
    "no prompt": (("--instance_data_dir", "dog"), "--instance_prompt is missing"),
    "empty prompt": (("--instance_data_dir", "dog", "--instance_prompt", " "), "instance_prompt=' ': expected a text"),
    "two captions": (
        ("--instance_data_dir", "dog", "--instance_prompt", "x", "--caption_column", "y"),
        "--instance_prompt is the caption of all images, and --caption_column names others",
    ),
    "misspelt": (("--instance_promt", "x"), "--instance_prompt"),
    "misspelt method": (("--method", "locca"), "perhaps loca"),
}
OF_A_SUBJECT = {
    "no class": (("--with_prior_preservation",), "--class_prompt is missing"),
    "class without": (("--class_prompt", "a cat"), "class_prompt='a cat': say --with_prior_preservation too"),
    "few class images": ((*PRIOR, "--num_class_images", "0"), "num_class_images=0"),
    "buckets": (("--aspect_ratio_buckets", "16,16"), "say --use_aspect_ratio_buckets too"),
    "odd buckets": (
        ("--use_aspect_ratio_buckets", "--aspect_ratio_buckets", "16,15"),
        "expected sides that are multiples of 2, got '16,15'",
    ),
    "resolution": (("--resolution", "15"), "resolution must be a multiple of 2, as the model's, got 15"),
    "locations of two": (("--location_init", "gradient", "--train_text_encoder"), "it chooses for the denoiser alone"),
    "too many batches": (("--location_init", "gradient", "--max_train_steps", "16"), "the run has 16 steps; choose by fewer"),
    "batches of nothing": (("--location_batches", "3"), "--location_batches: say --location_init gradient too"),
    "text encoder's rate": (("--text_encoder_lr", "1"), "say --train_text_encoder too"),
    "flow": (("--weighting_scheme", "mode"), "is trained by denoising diffusion, which has no such setting"),
    "length": (("--max_sequence_length", "5"), "the tokenizer of StableDiffusionPipeline decides"),
    "share": (("--caption_dropout", "1.5"), "caption_dropout=1.5"),
    "offset": (("--noise_offset", "-1"), "noise_offset must be a finite number from 0 up, got -1.0"),
    "steps": (("--validation_inference_steps", "0"), "validation_inference_steps=0"),
    "crops": (("--no-center_crop", "--cache_latents"), "latents of random crops cannot be kept; say --center_crop too"),
    "base": (("--pretrained_model_name_or_path", "nowhere/at-all"), "it cannot be loaded as a text-to-image pipeline"),
    "data": (("--instance_data_dir", "nowhere"), "nowhere"),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions(case, base_of, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more, sentence = REFUSED[case]
    base = base_of("sd")
    capsys.readouterr()  # its bar, where it is made here
    given = ["train-image", "--pretrained_model_name_or_path", str(base), *FEW, *more, "--output_dir", "out"]
    assert command(given) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("loca-vision train-image: ") and said.count("\n") == 1, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", OF_A_SUBJECT)
def test_settings_of_a_subject(case, dreambooth, tmp_path, capsys):
    more, sentence = OF_A_SUBJECT[case]
    assert run(tmp_path / "out", *dreambooth, *more) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["", "out/class"])
def test_class_images_among_those_to_learn(place, dreambooth, subject, tmp_path, capsys):
    assert run(tmp_path / "out", *dreambooth, *PRIOR, "--class_data_dir", subject / place) == 2
    assert "images of the class in there would be taken for images to learn" in capsys.readouterr().err


def test_settings_of_the_other_noise(base_of, subject, tmp_path, capsys):
    named = ("--pretrained_model_name_or_path", base_of("flux"), "--instance_data_dir", subject, "--instance_prompt", "a")
    for more in (("--snr_gamma", "5"), ("--noise_offset", "0.1"), ("--prediction_type", "v_prediction")):
        assert run(tmp_path / "out", *named, *FEW, *SHORT, *more) == 2
        assert "is trained by flow matching, which has no such setting" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_kind_of_pipeline(base_of, dreambooth, tmp_path, capsys):
    shutil.copytree(base_of("sd"), tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    about = json.loads(index.read_text())
    index.write_text(json.dumps(about | {"_class_name": "StableDiffusionInpaintPipeline"}))
    assert run(tmp_path / "out", *dreambooth, "--pretrained_model_name_or_path", tmp_path / "base") == 2
    assert "a StableDiffusionInpaintPipeline cannot be trained here" in capsys.readouterr().err
    index.write_text(json.dumps(about | {"_class_name": "Flux2KleinPipeline"}))
    assert run(tmp_path / "out", *dreambooth, "--pretrained_model_name_or_path", tmp_path / "base") == 2
    assert "it cannot be loaded as a text-to-image pipeline" in capsys.readouterr().err


def test_a_broken_image_is_named_before_the_first_step(dreambooth, tmp_path, capsys):
    folder = photographs(tmp_path / "dog")
    data = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(data[: len(data) // 2])
    assert run(tmp_path / "out", *dreambooth, "--instance_data_dir", folder) == 2
    assert "3.png: it cannot be read as an image" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_other_images_are_not_gone_on_with(dreambooth, tmp_path, capsys):
    """Neither by a finished run nor from a checkpoint."""
    folder, out = photographs(tmp_path / "dog"), tmp_path / "out"
    asked = (*dreambooth, "--instance_data_dir", folder)
    trained(out, *asked)
    (folder / "4.png").write_bytes((folder / "3.png").read_bytes() + b"longer")
    for left in ("finished", "killed"):
        if left == "killed":
            (out / "metrics.json").unlink()
        assert run(out, *asked, "--resume_from_checkpoint", "latest") == 2
        assert (
            "the run there began with other images: texts, or names or sizes of files, differ in image"
            in capsys.readouterr().err
        )


def test_a_run_of_another_trainer(dreambooth, tmp_path, capsys):
    trained(tmp_path / "one", *dreambooth, "--max_train_steps", "1")
    state = next((tmp_path / "one").glob("checkpoint-*/*.json"))
    state.write_text(state.read_text().replace("instance_prompt", "edit_prompt_column"))
    there = next((tmp_path / "one").glob("checkpoint-*"))
    assert run(tmp_path / "two", *dreambooth, "--resume_from_checkpoint", there) == 2
    assert "checkpoint-1" in capsys.readouterr().err and not (tmp_path / "two").exists()
