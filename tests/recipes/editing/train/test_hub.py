"""examples/instruct_pix2pix/train.py: the hub."""

import huggingface_hub
import yaml
from diffusers import StableDiffusionInstructPix2PixPipeline

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from support.edit_training import ADAPTER, LOCA, pipeline, trained
from support.photographs import scene


class Hub:
    """What a run asks of it."""

    def __init__(self, token=None):
        Hub.token = token

    def create_repo(self, name, private, exist_ok):
        Hub.made = (name, private)
        return type("Url", (str,), {"repo_id": f"me/{name}"})(f"https://hub/me/{name}")

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        Hub.files = {path: (folder_path / path).read_bytes() for path in allow_patterns}


def test_upload(flags, data, tmp_path, monkeypatch, pictures, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = tmp_path / "cartoon"
    trained(out, *flags, *LOCA, "--push_to_hub", "--hub_private", "--hub_token", "hf_secret")
    assert (Hub.token, Hub.made) == ("hf_secret", ("cartoon", True))
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/cartoon"
    assert set(Hub.files) == {"README.md", ADAPTER, "metrics.json", "config.yaml", "loss.png", "validation-6.png"}
    assert not any(b"hf_secret" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    _, front, text = Hub.files["README.md"].decode().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "diffusers" and "instruct-pix2pix" in about["tags"] and "base_model" not in about
    assert "picture = pipe('make it red', image=photo" in text  # of the data, where no instruction is given
    assert 'pipe.load_loca_weights("me/cartoon")' in text and "validation-6.png" in text and str(data.parent) not in text
    compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec")
    home = [str(place).encode() for place in (data.parent, tmp_path)]
    assert not [path for path, content in Hub.files.items() for place in home if place in content]
    shown = yaml.safe_load(Hub.files["config.yaml"])
    assert (shown["output_dir"], shown["train_data_dir"]) == ("cartoon", data.name)
    assert str(data) in (out / "config.yaml").read_text()  # here it is needed


def test_the_code_of_a_card_draws_what_the_picture_shows(flags, base, tmp_path, monkeypatch):
    """Of the very base, with what the adapter was trained to predict, and with the guidance of the picture."""
    from loca_vision.recipes.editing.model_card import edit_card

    metrics = trained(tmp_path / "out", *flags, *LOCA, "--prediction_type", "v_prediction", "--max_train_steps", "1")
    metrics["config"] |= {"pretrained_model_name_or_path": "a/base", "revision": "main", "validation_guidance_scale": 3.0}
    code = edit_card(metrics, "me/adapter").split("```python\n")[1].split("```")[0]
    asked = []
    pipe = pipeline(base)
    pipe.load_loca_weights = lambda name: asked.append(name)
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *one, **more: asked.append(more) or call(self, *one, **more))
    monkeypatch.setattr(
        StableDiffusionInstructPix2PixPipeline, "from_pretrained", lambda name, **more: asked.append((name, more)) or pipe
    )
    monkeypatch.setattr("diffusers.utils.load_image", lambda name: scene(16))
    exec(compile(code, "README.md", "exec"), {})
    assert asked[:2] == [("a/base", {"revision": "main"}), "me/adapter"]
    assert (asked[2]["guidance_scale"], asked[2]["image_guidance_scale"], asked[2]["num_inference_steps"]) == (3.0, 1.5, 2)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_a_base_that_is_gone_is_no_name_on_the_hub(flags, tmp_path):
    from loca_vision.recipes.editing.model_card import edit_card

    metrics = trained(tmp_path / "out", *flags, *LOCA, "--max_train_steps", "1")
    metrics["config"] |= {"pretrained_model_name_or_path": "/home/me/base", "train_data_dir": "/home/me/pairs"}
    assert "/home/me" not in edit_card(metrics, "me/adapter")
