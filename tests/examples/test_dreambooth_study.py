"""The study of subjects and styles on tiny settings: every step in order, nothing is done twice; and what it measures by."""

import json
import random
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from loca_vision.recipes.text_to_image.train import main as train_image
from subject_study import arms, likeness, measures, report, tuning
from subject_study.objects import KINDS
from subject_study.scenes import COLOURS, PLACES, Scene, drawn_scene, in_style, subject_scene
from support.scripts import script

SMALL = ["--resolution", "16", "--channels", "8", "16", "--drawings", "64", "--base_steps", "2", "--autoencoder_steps", "2"]
SMALL += ["--steps", "2", "--n_components", "5", "--ranks", "1", "--class_images", "2", "--likeness_steps", "2"]
SMALL += ["--pictures", "1", "--num_inference_steps", "1", "--batch_size", "4", "--jobs", "1"]


@pytest.fixture
def trained(monkeypatch):
    """The names of the adapters that are trained, in this process."""
    names = []

    def here(arguments, beside_others):
        assert not beside_others
        names.append(arguments[arguments.index("--output_dir") + 1].rsplit("/", 1)[1])
        assert train_image(arguments) == 0

    monkeypatch.setattr(arms, "_run", here)
    return names


def test_from_nothing_to_a_table_and_again(trained, tmp_path, capsys):
    study, out = script("dreambooth/study"), tmp_path / "study"
    command = [str(out), *SMALL, "--methods", "loca", "lora", "--rate_factors", "0.5"]
    assert study.main(command) == 0
    subjects, styles = ["subject-loca-5", "subject-lora-1", "subject-loca-5-prior"], ["style-loca-5", "style-lora-1"]
    assert trained == [*subjects, *styles]
    results = json.loads((out / "results.json").read_text())
    assert [one["arm"] and one["arm"]["name"] for one in results["subject"]] == [None, *subjects]
    base, loca, *_ = results["subject"]
    assert loca["arm"]["rate"] == 0.1
    assert base["trained"] == 0 < loca["trained"] and base["measured"]["class_change"] == 0
    assert loca["bytes"] == next((out / "adapters" / "subject-loca-5").glob("*.safetensors")).stat().st_size
    said = (out / "study.md").read_text()
    assert said in capsys.readouterr().out and f"{loca['measured']['likeness']:.2f}" in said
    for picture in ("numbers.png", "scales.png", "class.png"):
        with Image.open(out / picture) as image:
            image.verify()
    assert len(list((out / "class").glob("*.png"))) == 2
    trained.clear()
    assert study.main(command) == 0
    assert not trained and json.loads((out / "results.json").read_text()) == results
    assert study.main([*command, "--steps", "3"]) == 2
    assert "steps=2, not 3" in capsys.readouterr().err


def test_the_rate_of_the_largest_likeness_is_taken_and_none_is_tried_twice(tmp_path, monkeypatch):
    """At other seeds than those of the study."""
    likeness_at, asked = {0.03: 0.5, 0.1: 0.9, 0.3: 0.7}, []

    class Training:
        folder, seed = tmp_path, 7

        def adapters(self, candidates, into, seed):
            asked.append((into, [arm.rate for arm in candidates], seed))
            return [tmp_path / into / arm.name for arm in candidates]

    def measured(studio, task, folder):
        assert studio.seed == 8
        rate = {"tuning/0.3": 0.03, "tuning/1": 0.1, "tuning/3": 0.3}[f"tuning/{folder.parent.name}"]
        return dict.fromkeys(report._COLUMNS[task], 0.25) | {"likeness": likeness_at[rate]}

    monkeypatch.setattr(tuning, "measured", measured)
    monkeypatch.setattr(tuning, "read_metrics", lambda folder: {"trained_parameters": 5, "adapter_bytes": 6})
    studio, arm = measures.Studio(None, None, None, 1, 7), arms.Arm("style", "lora", 1, 0.1)
    assert tuning.best_rates(Training(), studio, [arm], (3.0, 0.3, 1.0)) == {"style-lora-1": 0.1}
    assert [(into, seed) for into, _, seed in asked] == [("tuning/0.3", 8), ("tuning/1", 8), ("tuning/3", 8)]
    assert (tmp_path / "tuning.md").read_text().count("| LoRA, r = 1 |") == 3
    monkeypatch.setattr(tuning, "measured", None)
    assert tuning.best_rates(Training(), studio, [arm], (0.3, 1.0, 3.0)) == {"style-lora-1": 0.1}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rate_factors", "1", "0"], "rate_factors=[1.0, 0.0]"),
        (["--methods", "lora", "lora"], "none twice"),
        (["--methods", "nothing"], "nothing"),
        (["--resolution", "20"], "multiple of 8"),
        (["--steps", "0"], "steps=0"),
        (["--ranks", "0"], "ranks=[0]"),
        (["--n_components", "5", "5"], "n_components=[5, 5]"),
        (["--channels", "16"], "channels=[16]"),
        (["--channels", "8", "9"], "channels=[8, 9]"),
        (["--learning_rate", "2"], "learning_rate=2"),
        (["--guidance_scale", "-1"], "guidance_scale=-1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(trained, tmp_path, capsys, flags, sentence):
    assert script("dreambooth/study").main([str(tmp_path / "out"), *SMALL, *flags]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not trained and not (tmp_path / "out").exists()


def test_an_adapter_that_fails_ends_the_study_in_one_line(tmp_path, monkeypatch, capsys):
    """Alone it has said what is wrong; beside others it says so then."""
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2, "no base"))
    for jobs in (1, 2):
        training = arms.Training(tmp_path, 2, 16, 2, 1, 1.0, 0, jobs)
        with pytest.raises(ValueError, match="style-lora-1 ended with status 2"):
            training.adapters([arms.Arm("style", "lora", 1, 1e-3)])
        assert "no base" in capsys.readouterr().err


# Drawings


def test_captions_say_what_is_in_a_scene():
    scene = Scene("fish", "red", "at sea")
    assert scene.caption() == "a red fish at sea"
    assert replace(scene, kind="bird", two=True).caption() == "two red birds at sea"
    assert in_style(scene).caption() == "a red fish in neon style"
    worn = replace(scene, kind="cup", traits=("stripes", "crown"))
    assert worn.caption() == "a striped red cup with a crown at sea"
    assert replace(worn, style="crayon").caption(colour=False) == "a striped cup with a crown in crayon style"
    assert scene.caption(colour=False, place=False) == "a fish"


def test_what_a_caption_says_is_seen_in_the_drawing():
    """Another kind, colour, place, mark, number or style is another picture; the same scene is the same one."""
    scene = Scene("fish", "red", "at sea", pose=3)
    others = [replace(scene, kind=kind) for kind in KINDS if kind != "fish"]
    others += [replace(scene, colour=colour) for colour in COLOURS if colour != "red"]
    others += [replace(scene, place=place) for place in PLACES if place != "at sea"]
    others += [replace(scene, traits=(mark,)) for mark in likeness.MARKS]
    others += [replace(scene, kind=kind, traits=(mark,)) for kind in KINDS if kind != "fish" for mark in ("stripes", "crown")]
    others += [replace(scene, two=True), replace(scene, pose=4), replace(scene, style="crayon"), in_style(scene)]
    drawn = [np.asarray(one.picture(24)) for one in (scene, *others)]
    assert len({one.tobytes() for one in drawn}) == len(drawn)
    assert np.array_equal(drawn[0], np.asarray(scene.picture(24)))
    assert not np.array_equal(drawn[0][2], drawn[0][-3])  # sky and sea
    assert drawn[-1].mean() < 90 < 180 < drawn[-2].mean()  # neon on a dark ground, crayon on paper


def test_what_adapters_are_measured_on_was_never_shown_to_them():
    subjects, styles = arms.subject_drawings(), arms.style_drawings()
    assert len(subjects) == len(styles) == 8
    assert {one.place for one in subjects} == set(arms.SHOWN_PLACES) < set(PLACES)
    held = [one for place in PLACES for one in arms.held_subjects(place, 8)]
    assert len({one.pose for one in (*subjects, *held)}) == len(subjects) + len(held)
    new = arms.style_scenes(measures.STYLE_PROMPTS)
    assert not {one.kind for one in new} & {one.kind for one in styles} and all(one.style == "neon" for one in new)
    assert len({(one.kind, one.colour) for one in new}) == len(new)
    draws = random.Random(0)
    shown = [drawn_scene(draws) for _ in range(200)]
    assert not any(one.style == "neon" or one.colour == "orange" or "one_eye" in one.traits for one in shown)
    assert not any(one.kind == "fish" and one.traits for one in shown) and any("crown" in one.traits for one in shown)
    assert {one.kind for one in shown} == set(KINDS) and {one.place for one in shown} == set(PLACES)


# Measures


def test_the_network_learns_to_tell_neon_from_the_rest():
    """And asking twice gives the same network; the global generator is left alone."""
    state = torch.get_rng_state()
    eyes = [likeness.trained_eye(_Through(), 16, 160, 60, seed=1) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, eyes[1].state_dict()[name]) for name, one in eyes[0].state_dict().items())
    scenes = [Scene(kind, "red", "on a white background", pose=7) for kind in KINDS]
    plain, neon = ([one.picture(16) for one in some] for some in (scenes, map(in_style, scenes)))
    assert likeness.seen(eyes[0], plain).share("style", "neon") == 0
    assert likeness.seen(eyes[0], neon).share("style", "neon") == 1
    assert likeness.accuracies(eyes[0], _Through(), 16, 40, 2)["style"] > 0.8


def test_likeness_and_marks_are_what_they_say():
    answers = {name: [choices[0]] * 2 for name, choices in likeness.QUESTIONS.items()}
    one = likeness.Seen(torch.eye(3)[:2], answers | {"stripes": [True, False], "colour": ["orange", "orange"]})
    other = likeness.Seen(torch.eye(3)[:1], answers)
    assert one.likeness(other) == 0.5 and one.share("stripes", True) == 0.5 and one.share("kind", "cup") == 0
    assert measures.marks_of(one) == (0.5 + 0 + 0 + 1) / 4


def test_answers_that_a_picture_cannot_show_are_not_asked_for():
    scenes = [subject_scene("at night", 1), in_style(Scene("cup", "red", "at sea"))]
    assert likeness._wanted("place", scenes).tolist() == [PLACES.index("at night"), -1]
    assert likeness._wanted("crown", scenes).tolist() == [1, 0]
    assert likeness._wanted("colour", scenes).tolist() == [len(COLOURS), 0]


def test_a_table_has_a_row_for_each_adapter_and_names_what_is_missing():
    found = dict.fromkeys(report._COLUMNS["subject"], 0.25)
    rows = report.table(
        "subject",
        [
            report.Result(None, found),
            report.Result(arms.Arm("subject", "lora", 4, 5e-3, prior=True), found, 1000, 2000, 0.1),
        ],
    ).splitlines()
    assert len(rows) == 4 and rows[2].startswith("| base | 0.25 | 25 |") and rows[2].endswith("| - | - | - |")
    assert rows[3].startswith("| LoRA, r = 4, with prior preservation |") and "| 1,000 | 2,000 | 0.005 |" in rows[3]


class _Through:
    """An autoencoder that changes nothing."""

    def encode(self, images):
        return type("Encoded", (), {"latent_dist": type("Latents", (), {"mode": staticmethod(lambda: images)})})

    def decode(self, latents):
        return type("Decoded", (), {"sample": latents})


def test_every_method_has_a_line_in_the_picture(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "save", lambda figure, path: shown.append(figure))
    methods = ("loca", "fourierft", "waveft", "shira", "lora")
    every = [arms.Arm("subject", method, size, 1e-3) for method in methods for size in (1, 4)]
    results = [report.Result(arm, {"likeness": 0.5}, 100 * arm.size) for arm in every]
    results.append(report.Result(None, {"likeness": 0.1}))
    report.draw_numbers(tmp_path / "numbers.png", {"subject": results}, {"subject": 0.9})
    (axes,) = shown[0].axes
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [line.get_label() for line in lines] == ["LoCA", "FourierFT", "WaveFT", "SHiRA", "LoRA"]
    assert len({line.get_color() for line in lines}) == 5
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "400"]
