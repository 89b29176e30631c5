"""examples/instruct_pix2pix/train.py: refused settings and folders."""

import json
import shutil

import pytest
import torch

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.formats.packed.reading import open_adapter
from loca_vision.storage.run_checkpoint import write_checkpoint
from support.edit_training import ADAPTER, LOCA, SMOOTH, TRAIN, trained
from support.scripts import main

REFUSED = {
    "nothing": ((), "pretrained_model_name_or_path"),
    "no data": (
        ("--pretrained_model_name_or_path", "x"),
        "says where the pairs are; nothing was given",
    ),
    "both": (("--dataset_name", "a/b"), "says where the pairs are; both was given"),
    "another method's": (("--method", "lora", "--n_components", "3"), "--n_components is a setting of loca, sdctft, fourierft"),
    "layers": (("--layers", "*atn2*"), "layers: the pattern '*atn2*' fits no projection of the model; perhaps attn2"),
    "rank": (("--rank", "3"), "--rank is a setting of lora, selora; the method is loca"),
    "preset": (("--preset", "cartoonisation"), "perhaps cartoonization"),
    "preset's method": (("--preset", "cartoonization", "--method", "lora"), "is for the method loca"),
    "flag": (("--learning_rte", "3"), "learning_rte"),
    "cache": (("--cache_latents",), "latents of random crops cannot be kept; say --center_crop too"),
    "dropout": (("--conditioning_dropout_prob", "0.5"), "expected a number from 0 to 1/3"),
    "gamma": (("--snr_gamma", "0"), "snr_gamma=0.0: expected a number above 0"),
    "rate": (("--learning_rate", "-1"), "learning_rate must be a finite number from 0 up, got -1.0"),
    "image": (("--validation_image", "x.png"), "--validation_prompt is missing"),
    "target": (("--validation_target", "x.png"), "1 of them for 0 validation images"),
    "guidance": (("--validation_guidance_scale", "0.5"), "guidance_scale=0.5: expected a finite number from 1 up"),
    "column": ((*LOCA, "--original_image_column", "befor"), "has no such column"),
    "resolution": (("--resolution", "17"), "resolution must be a multiple of 2"),
    "batch": ((*LOCA, "--train_batch_size", "11"), "a step takes 11 pairs"),
    "components": (("--n_components", "1000"), "n_components=1000"),
    "base": (
        ("--pretrained_model_name_or_path", "nowhere/at-all"),
        "nowhere/at-all: it cannot be loaded as a pipeline",
    ),
    "fp16": (("--mixed_precision", "fp16"), "fp16: this precision needs a GPU"),
    "conv_in": (("--conv_in_lr", "1"), "conv_in_lr=1.0: say --train_conv_in too"),
    "ema": (("--ema_decay", "0.5"), "ema_decay=0.5: say --use_ema too"),
    "token": (("--hub_token", "x"), "--hub_token: say --push_to_hub too"),
    "shown token": (
        ("--hub_token", "x", "--push_to_hub", "--report_to", "wandb"),
        "the command line goes to others, and the token with it",
    ),
    "xformers": (("--enable_xformers_memory_efficient_attention",), "it needs xformers"),
    "8 bit": (("--use_8bit_adam",), "it needs bitsandbytes"),
    "config of a folder": ((*LOCA, "--dataset_config_name", "all"), "only a data set on the hub has configurations"),
    "checkpoint": (("--resume_from_checkpoint", "nowhere"), "'nowhere': there is no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_sentence_and_leave_nothing(case, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more, sentence = REFUSED[case]
    given = () if case == "nothing" else more if case == "no data" else (*flags, *more)
    assert main(TRAIN, *given, "--output_dir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert sentence in said and said.strip().splitlines()[-1].startswith("train.py: "), said
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".yaml", ".png")]


def test_what_resume_refuses(whole, flags, plain_base, tmp_path, capsys):
    out, _ = whole
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    same = (*flags, *LOCA, *SMOOTH, "--output_dir", out)
    cases = {
        (): "a run is in there",
        (
            "--resume_from_checkpoint",
            "latest",
            "--learning_rate",
            "1",
        ): "the finished run there has other settings: learning_rate",
    }
    for more, sentence in cases.items():
        assert main(TRAIN, *same, *more) == 2
        assert sentence in capsys.readouterr().err
    from_there = ("--output_dir", tmp_path / "out", "--resume_from_checkpoint", out / "checkpoint-6")
    assert main(TRAIN, *same, *from_there, "--targets", "q") == 2
    assert "the run there has other settings: targets=['q'], ['q', 'k', 'v', 'out'] before" in capsys.readouterr().err
    for more, sentence in {
        ("--train_batch_size", "2"): "batch_size=2, 4 before; of all 1 processes together",
        ("--max_train_samples", "5"): "the run there has other settings: max_train_samples=5",
        ("--max_train_steps", "3"): "6 steps are taken there, and this run is to have 3",
    }.items():
        assert main(TRAIN, *same, *from_there, *more) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_number_of_pairs_is_not_gone_on_with(flags, data, tmp_path, capsys):
    """The permutations of an epoch would be others."""
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    shutil.copytree(data, pairs)
    same = (*flags, *LOCA, "--train_data_dir", pairs, "--max_train_steps", "2")
    trained(out, *same)
    table = pairs / "train" / "metadata.jsonl"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:9]))
    (out / "metrics.json").unlink()  # as of a run that is killed at the end
    assert main(TRAIN, *same, "--output_dir", out, "--resume_from_checkpoint", "latest") == 2
    assert "pairs=9, 10 before" in capsys.readouterr().err


def test_runs_are_not_written_over(whole, flags, tmp_path, capsys):
    """By one that goes on from a checkpoint elsewhere, or from none."""
    out, _ = whole
    mine, same = tmp_path / "mine", (*flags, *LOCA, *SMOOTH)
    trained(mine, *same, "--max_train_steps", "1")
    (mine / "metrics.json").rename(tmp_path / "metrics.json")
    before = {path.name: path.stat().st_mtime_ns for path in mine.iterdir()}
    assert main(TRAIN, *same, "--output_dir", mine, "--resume_from_checkpoint", out / "checkpoint-6") == 2
    assert "a run is in there (checkpoint-1)" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in mine.iterdir()} == before
    (tmp_path / "metrics.json").rename(mine / "metrics.json")
    shutil.rmtree(mine / "checkpoint-1")
    assert main(TRAIN, *same, "--output_dir", mine, "--resume_from_checkpoint", "latest") == 2
    assert "the finished run there left no whole checkpoint to go on from" in capsys.readouterr().err


def test_a_finished_run_says_so_and_may_be_saved_in_another_dtype(whole, flags, tmp_path, capsys):
    out, metrics = whole
    shutil.copytree(out, tmp_path / "out")
    again = ("--output_dir", tmp_path / "out", "--resume_from_checkpoint", "latest")
    assert main(TRAIN, *flags, *LOCA, *SMOOTH, *again) == 0
    assert "finished, after step 6" in capsys.readouterr().out
    assert main(TRAIN, *flags, *LOCA, *SMOOTH, *again, "--adapter_dtype", "float16") == 0
    with open_adapter(tmp_path / "out" / ADAPTER) as file:
        assert {entry.dtype for name, entry in file.entries.items() if name.endswith("coefficients")} == {"F16"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["curves"] == metrics["curves"]


def test_a_checkpoint_of_another_script_is_no_fault(flags, tmp_path, capsys):
    at = flags.index("--seed")
    path = write_checkpoint(tmp_path / "other", 1, {"a": torch.zeros(1)}, {"recipe": {"dataset": "digits"}})
    for given in (flags, (*flags[:at], *flags[at + 2 :])):
        assert main(TRAIN, *given, *LOCA, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", path) == 2
        assert "it is a checkpoint, but not of InstructPix2Pix training" in capsys.readouterr().err
