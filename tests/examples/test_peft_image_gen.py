"""peft's image generation benchmark: its protocol, its measures, its schema, and a whole run on a tiny stand-in."""

import json
import math
import sys

import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, Qwen3Config, Qwen3ForCausalLM

import peft_image_gen_measures as measures
from loca_vision.data.buckets import BucketView
from loca_vision.data.images import open_image
from peft_image_gen_log import Log
from peft_image_gen_measures import Drawer, drift, encoded, pictures, similarity
from peft_image_gen_protocol import INSTANCE_PROMPTS, Protocol, prepared, split
from peft_image_gen_table import Row, read_row, rows_of, table
from support.flow_pipelines import flux2_klein, words
from support.photographs import scene
from support.scripts import main, script

NAME = "dreambooth/peft_image_gen"
NUMBER = (int, float)
# What one of peft's files, lora--flux2-klein-default.json, holds: each key and the type of its value.
SCHEMA = {
    "run_info": {
        "created_at": str,
        "total_time": float,
        "experiment_name": str,
        "peft_branch": str,
        "train_config": {
            "model_id": str,
            "dataset_id": str,
            "dataset_split": str,
            "dtype": str,
            "resolution": int,
            "batch_size": int,
            "batch_size_eval": int,
            "repeats": int,
            "max_steps": int,
            "eval_steps": int,
            "compile": bool,
            "use_gc": bool,
            "seed": int,
            "grad_norm_clip": float,
            "optimizer_type": str,
            "optimizer_kwargs": {"lr": float, "weight_decay": float},
            "lr_scheduler": type(None),
            "use_amp": bool,
            "autocast_adapter_dtype": bool,
            "instance_prompts": list,
            "image_column": str,
            "valid_size": int,
            "test_size": int,
            "num_inference_steps": int,
            "guidance_scale": float,
            "max_sequence_length": int,
            "text_encoder_out_layers": list,
            "weighting_scheme": str,
            "logit_mean": float,
            "logit_std": float,
            "mode_scale": float,
            "dino_model_id": str,
            "dino_image_size": int,
            "sample_image_prompts": list,
            "drift_image_prompts": list,
        },
        "peft_config": dict,
        "error_msg": str,
    },
    "train_info": {
        "accelerator_memory_reserved_avg": int,
        "accelerator_memory_max": int,
        "accelerator_memory_reserved_99th": int,
        "train_time": float,
        "file_size": int,
        "num_trainable_params": int,
        "num_total_params": int,
        "status": str,
        "metrics": list,
    },
    "meta_info": {
        "model_info": {"sha": (str, type(None)), "created_at": (str, type(None))},
        "dataset_info": {"sha": (str, type(None)), "created_at": (str, type(None))},
        "package_info": {
            f"{package}-{what}": (str, type(None))
            for package in ("transformers", "peft", "datasets", "diffusers", "torch")
            for what in ("version", "commit-hash")
        },
        "system_info": dict.fromkeys(("system", "release", "version", "machine", "processor", "accelerator"), str),
        "pytorch_info": str,
    },
}
VALIDATION = {
    "step": int,
    "valid dino_similarity": float,
    "train loss": float,
    "train samples": int,
    "train time": float,
    "eval time": float,
    "mem allocated avg": float,
    "mem reserved avg": float,
    "elapsed time": float,
}
LAST = {"step": int, "test dino_similarity": float, "drift": float, "train loss": float, "train samples": int}
PROMPTS = ("a cat", "a dog", "make it red", "a red cat", "a red dog", "cat")
STEPS = ("--max_steps", 5, "--eval_steps", 2, "--learning_steps", 4)


def same_schema(value, schema, where=""):
    if not isinstance(schema, dict):
        assert isinstance(value, schema) and (schema is bool or not isinstance(value, bool)), f"{where}: {value!r}"
        return
    assert value.keys() == schema.keys(), where
    for key, kind in schema.items():
        same_schema(value[key], kind, f"{where}.{key}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny klein, a tiny DINOv2 and six images."""
    folder = tmp_path_factory.mktemp("stand_in")
    pipe = flux2_klein()
    torch.default_generator.manual_seed(4)
    config = Qwen3Config(
        vocab_size=len(words()), hidden_size=8, intermediate_size=8, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=512,
    )  # fmt: skip
    pipe.register_modules(text_encoder=Qwen3ForCausalLM(config).eval())
    pipe.save_pretrained(folder / "base")
    torch.default_generator.manual_seed(7)
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, mlp_ratio=2)
    Dinov2Model(dino).save_pretrained(folder / "dino")
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    BitImageProcessor(**sizes).save_pretrained(folder / "dino")
    (folder / "cats").mkdir()
    for number in range(len(PROMPTS)):
        scene(40).rotate(17 * number).crop((0, 4, 40, 22 if number % 2 else 38)).save(folder / "cats" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def common(place):
    given = ["--base", place / "base", "--dino", place / "dino", "--dataset", place / "cats", "--instance_prompts", *PROMPTS]
    given += ["--valid_size", 1, "--test_size", 2, "--resolution", 16, "--num_inference_steps", 1, "--max_sequence_length", 24]
    return [*given, "--learning_rate", 0.1]


@pytest.fixture(scope="module")
def flags(common):
    return [*common, "--n_components", 5, "--coefficient_steps", 1, "--location_steps", 1, *STEPS]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(NAME, "--output_dir", out, *flags) == 0
    return out


def result(out):
    return json.loads((out / f"loca--{out.name}.json").read_text())


def timeless(value):
    """Without what depends on the clock and on names of folders."""
    passed = ("created_at", "experiment_name")
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if "time" not in key and key not in passed}
    return [timeless(one) for one in value] if isinstance(value, list) else value


# The protocol


def test_the_parts_are_those_of_the_benchmark():
    """As NumPy's shuffle with the seed 0 divides 20 rows."""
    train, valid, test = split(20, 2, 4)
    assert train == [18, 1, 19, 8, 10, 17, 6, 13, 4, 2, 5, 14, 9, 7]
    assert (valid, test) == ([16, 11], [3, 0, 15, 12])


def test_the_defaults_are_the_benchmarks():
    config = Protocol().train_config(1e-4)
    same_schema(config, SCHEMA["run_info"]["train_config"])
    assert Protocol().departures() == {} and len(config["instance_prompts"]) == 20 and len(config["drift_image_prompts"]) == 10
    assert (config["max_steps"], config["batch_size"], config["text_encoder_out_layers"]) == (750, 2, [10, 20, 30])
    assert (
        config["optimizer_kwargs"] == {"lr": 1e-4, "weight_decay": 1e-4}
        and config["instance_prompts"][0] == INSTANCE_PROMPTS[0]
    )


def test_images_to_train_on_are_squeezed_and_the_others_are_as_they_were(place, tmp_path):
    protocol = Protocol(
        dataset=str(place / "cats"), instance_prompts=PROMPTS, valid_size=1, test_size=2, resolution=16, eval_steps=1
    )
    parts = prepared(protocol, tmp_path)
    train, valid, test = split(6, 1, 2)
    for number in train:
        whole, file = open_image(place / "cats" / f"{number}.png"), parts.train / f"{number:02d}.png"
        assert open_image(file).tobytes() == whole.resize((16, 16), Image.Resampling.BILINEAR).tobytes()
        assert file.with_suffix(".txt").read_text() == PROMPTS[number]
        view = BucketView((16, 16), crop="center", flip=False)  # as the trainer sees it: nothing is cut or scaled
        pixels = view.pixels(open_image(file), view.drawn(0, 0, 0))
        assert pixels.permute(1, 2, 0).contiguous().numpy().tobytes() == open_image(file).tobytes()
    for held, places in ((parts.valid, valid), (parts.test, test)):
        assert held.prompts == tuple(PROMPTS[number] for number in places)
        originals = [open_image(place / "cats" / f"{number}.png") for number in places]
        assert [image.tobytes() for image in held.images()] == [image.tobytes() for image in originals]


# Measures


def test_similarity_and_drift_of_constructed_features():
    one, other = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [math.sqrt(0.75), 0.5]])
    assert similarity(one, other) == 0.75 and drift(one, other) == 0.125
    assert drift(one, one) == 0 and drift(one, -one) == 1


def test_features_are_those_of_the_class_token(place):
    dino = measures.Dino(str(place / "dino"), torch.device("cpu"))
    images = [scene(40), scene(40).rotate(90)]
    found = dino.features(images)
    with torch.no_grad():
        states = dino.model(**dino.processor(images=images, return_tensors="pt")).last_hidden_state[:, 0]
    torch.testing.assert_close(found, states / states.norm(dim=1, keepdim=True))


def test_pictures_are_those_that_the_pipeline_draws_with_one_generator(place, tmp_path):
    """Of which those that are there already are not drawn again, and change nothing about the others."""
    pipe = Flux2KleinPipeline.from_pretrained(place / "base")
    pipe.set_progress_bar_config(disable=True)
    protocol = Protocol(resolution=16, num_inference_steps=2, max_sequence_length=24)
    texts = encoded(pipe, PROMPTS[:2], protocol)
    generator, wanted = torch.Generator().manual_seed(5), []
    for prompt in PROMPTS[:2]:
        layers = {"text_encoder_out_layers": (10, 20, 30), "max_sequence_length": 24}
        size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.5}
        wanted.append(pipe(prompt=prompt, generator=generator, **layers, **size).images[0].tobytes())
    drawer = Drawer(pipe, texts, protocol)
    drawn = pictures(drawer, PROMPTS[:2], 5, tmp_path, name="a-")
    assert [image.tobytes() for image in drawn] == wanted and wanted[0] != wanted[1]
    (tmp_path / "a-02.png").unlink()
    scene(16).save(tmp_path / "a-01.png")
    again = pictures(drawer, PROMPTS[:2], 5, tmp_path, name="a-")
    assert again[0].tobytes() == scene(16).tobytes() and again[1].tobytes() == wanted[1]


# Whole runs


def test_a_run_has_the_schema_of_peft(finished):
    found = result(finished)
    same_schema(found, SCHEMA)
    *validations, last = found["train_info"]["metrics"]
    assert [entry["step"] for entry in validations] == [2, 4]
    for entry in validations:
        same_schema(entry, VALIDATION)
    same_schema(last, LAST)
    assert (last["step"], last["train samples"]) == (5, 10) and 0 <= last["drift"] <= 1
    assert found["run_info"]["peft_config"]["peft_type"] == "LOCA" and found["run_info"]["experiment_name"] == "loca/tiny"
    info = found["train_info"]
    # 12 projections of the block with two streams and 5 of the other, each with 5 coefficients and their two coordinates
    assert info["num_trainable_params"] == 17 * 15
    pipe = Flux2KleinPipeline.from_pretrained(found["run_info"]["train_config"]["model_id"])
    assert info["num_total_params"] == sum(p.numel() for p in pipe.transformer.parameters()) + 17 * 15
    assert info["file_size"] == next((finished / "adapter").glob("*.safetensors")).stat().st_size
    losses = json.loads((finished / "adapter" / "metrics.json").read_text())["curves"]["loss"]
    assert validations[1]["train loss"] == pytest.approx((losses[2] + losses[3]) / 2)
    assert len(list((finished / "samples").glob("loca--tiny_0*.png"))) == 5
    assert len(list((finished / "pictures").iterdir())) == 2 * 3 + 2 * 10


def test_the_measures_are_of_the_pictures_that_are_there(finished, place):
    dino = measures.Dino(str(place / "dino"), torch.device("cpu"))

    def features(name):
        return dino.features([open_image(file) for file in sorted((finished / "pictures").glob(f"{name}-*.png"))])

    last = result(finished)["train_info"]["metrics"][-1]
    held = [open_image(finished / "images" / "test" / f"{number:02d}.png") for number in split(6, 1, 2)[2]]
    assert last["test dino_similarity"] == pytest.approx(similarity(features("test"), dino.features(held * 3)))
    assert last["drift"] == pytest.approx(drift(features("drift-adapter"), features("drift-base")), abs=1e-7)
    base, adapter = (sorted((finished / "pictures").glob(f"drift-{who}-*.png")) for who in ("base", "adapter"))
    different = [one.read_bytes() != other.read_bytes() for one, other in zip(base, adapter, strict=True)]
    assert any(different)  # something was learned


def test_a_stopped_run_goes_on_to_the_same_numbers(finished, flags, tmp_path, monkeypatch):
    """Stopped after the checkpoint of step 2 and before its validation, then among the pictures."""
    task = sys.modules[script(NAME).task_of.__module__].BenchmarkTask
    out, sheet, picture, drawn = tmp_path / "again", task.sheet, Drawer.picture, []

    def stop(*given):
        raise KeyboardInterrupt

    def counted(*given):
        drawn.append(given)
        return picture(*given) if len(drawn) < 15 else stop()

    monkeypatch.setattr(task, "sheet", stop)
    assert main(NAME, "--output_dir", out, *flags) == 130
    assert [path.name for path in (out / "adapter").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(task, "sheet", sheet)
    monkeypatch.setattr(Drawer, "picture", counted)
    assert main(NAME, "--output_dir", out, *flags) == 130
    before = {file: file.stat().st_mtime_ns for file in (out / "pictures").iterdir()}
    assert before
    monkeypatch.setattr(Drawer, "picture", picture)
    assert main(NAME, "--output_dir", out, *flags) == 0
    assert before.items() <= {file: file.stat().st_mtime_ns for file in (out / "pictures").iterdir()}.items()
    assert timeless(result(out)) == timeless(result(finished))


def test_another_method_and_texts_of_the_benchmarks_layers(common, tmp_path, monkeypatch):
    """Query and value of the 8 and 3 matrices of attention in two blocks, 32 wide, with factors of rank 2."""
    encode, layers = Flux2KleinPipeline.encode_prompt, []

    def watched(pipe, prompt=None, *given, prompt_embeds=None, text_encoder_out_layers=(9, 18, 27), **more):
        layers.extend([text_encoder_out_layers] if prompt_embeds is None else [])
        return encode(
            pipe, prompt, *given, prompt_embeds=prompt_embeds, text_encoder_out_layers=text_encoder_out_layers, **more
        )

    monkeypatch.setattr(Flux2KleinPipeline, "encode_prompt", watched)
    method = ("--method", "lora", "--rank", 2, "--targets", "q", "v", "--max_steps", 2, "--eval_steps", 2)
    assert main(NAME, "--output_dir", tmp_path / "out", *common, *method) == 0
    assert layers and set(layers) == {(10, 20, 30)}
    found = json.loads((tmp_path / "out" / "lora--out.json").read_text())
    same_schema(found, SCHEMA)
    assert found["run_info"]["peft_config"]["peft_type"] == "LORA" and found["run_info"]["peft_config"]["r"] == 2
    assert found["train_info"]["num_trainable_params"] == 6 * 2 * (32 + 32)
    train, total = found["train_info"]["train_time"], found["run_info"]["total_time"]
    assert 0 < found["train_info"]["metrics"][0]["train time"] < train < total


def test_a_finished_run_is_not_made_again(finished, flags, monkeypatch, capsys):
    monkeypatch.setattr(script(NAME), "train", None)
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    assert main(NAME, "--output_dir", finished, *flags) == 0
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    assert "loca/tiny" in capsys.readouterr().out


def test_a_dry_run_says_what_is_needed_and_leaves_nothing(place, flags, tmp_path, capsys):
    assert main(NAME, "--output_dir", tmp_path / "out", *flags, "--dry_run") == 0
    said = capsys.readouterr().out
    pipe = Flux2KleinPipeline.from_pretrained(place / "base")
    size = 2 * sum(parameter.numel() for parameter in pipe.transformer.parameters())
    assert f"transformer {size / 1e9:.3g} GB" in said and "255 trained numbers" in said
    assert "not the benchmark's: resolution=16, there 512" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--eval_steps", 6], "eval_steps=6: expected at most max_steps, 5"),
        (["--resolution", 0], "resolution"),
        (["--guidance_scale", "nan"], "guidance_scale=nan"),
        (["--rank", 4], "--rank is a setting of lora, selora"),
        (["--test_size", 5], "expected over 6"),
        (["--base", "nowhere/at/all"], "no such folder"),
        (["--learning_rate", 0.2], "learning_rate=0.1, not 0.2"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(finished, flags, capsys, more, sentence):
    assert main(NAME, "--output_dir", finished, *flags, *more) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_weights_that_no_processor_can_train_are_refused(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys.modules["peft_image_gen_needs"], "SMALL", 1000)
    assert main(NAME, "--output_dir", tmp_path / "out", *flags) == 2
    assert "expected a GPU for" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_line_that_was_cut_off_does_not_count(tmp_path):
    (tmp_path / "log").write_bytes(b'{"step": 1, "seconds": 2.0}\n{"step": 2, "sec')
    log = Log(tmp_path / "log")
    log.add(step=2, seconds=3.0)
    assert Log(tmp_path / "log").entries == [{"step": 1, "seconds": 2.0}, {"step": 2, "seconds": 3.0}]


# The table


def theirs(name, similarity, **changes):
    train = {
        "num_trainable_params": 6400,
        "file_size": 9,
        "accelerator_memory_max": 10**9,
        "train_time": 1.5,
        "status": "success",
    }
    last = {"test dino_similarity": similarity, "drift": 0.25, "train loss": 0.7} | changes
    return {"run_info": {"experiment_name": name}, "train_info": train | {"metrics": [{}, last]}}


def test_our_run_beside_theirs(finished, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(theirs("lora/default", -2.0)))
    (tmp_path / "b.json").write_text(json.dumps(theirs("full-finetuning/default", 2.0, drift=math.nan)))
    failed = theirs("oft/default", 0.7)
    failed["train_info"]["status"] = "canceled"
    (tmp_path / "c.json").write_text(json.dumps(failed))
    assert main(NAME, "--output_dir", finished, "--compare", tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "not shown, as the run did not succeed: c.json"
    assert [line.split()[:2] for line in said[2:]] == [
        ["full-finetuning/default", "2.0000"],
        [">", "loca/tiny"],
        ["lora/default", "-2.0000"],
    ]
    assert said[2].split()[2] == "-"


def test_a_table_of_rows():
    row = Row("lora/x", 0.69715, 0.262, 0.75, 38338560, 153_000_000, 10_708_058_112, 759.2)
    cells = ["lora/x", "0.6972", "0.2620", "0.7500", "38,338,560", "153.00", "10.71", "759"]
    assert table([row]).splitlines()[1].split() == cells


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_info": {}}', json.dumps(theirs(3, 0.5)), json.dumps(theirs("a", "b"))])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match="expected a result file of the benchmark"):
        read_row(tmp_path / "other.json")


def test_folders_without_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        rows_of(tmp_path)
    with pytest.raises(FileNotFoundError):
        rows_of(tmp_path / "nowhere")


def test_a_name_shows_no_commands_to_a_terminal(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(theirs("\x1b[2Jlora", 0.5)))
    assert read_row(tmp_path / "a.json").name == "?[2Jlora"
