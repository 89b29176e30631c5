"""What is wrong with the pairs is said before the first step; a run goes on with its own pairs only."""

import json
import shutil

import pytest
from PIL import Image

from support.edit_training import LOCA, TRAIN, trained
from support.scripts import main

datasets = pytest.importorskip("datasets")


@pytest.fixture
def pairs(data, tmp_path):
    shutil.copytree(data, tmp_path / "pairs")
    return tmp_path / "pairs"


def flags_for(flags, pairs):
    return (*flags, *LOCA, "--train_data_dir", pairs, "--max_train_steps", "2", "--checkpointing_steps", "1")


def with_prompts(pairs, change):
    table = pairs / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text(
        "".join(json.dumps(row | {"edit_prompt": change(i, row["edit_prompt"])}) + "\n" for i, row in enumerate(rows))
    )


def test_instructions_that_are_cut_are_counted(flags, pairs, tmp_path, capsys):
    with_prompts(pairs, lambda index, prompt: "make it red " * 50 if index in (3, 4) else prompt)
    metrics = trained(tmp_path / "out", *flags_for(flags, pairs))
    said = capsys.readouterr().out
    assert "2 of 10 instructions are longer than the " in said and "the first is in row 3, with " in said
    assert metrics["cut_instructions"] == 2


def test_whole_instructions_are_not_spoken_of(flags, pairs, tmp_path, capsys):
    assert trained(tmp_path / "out", *flags_for(flags, pairs))["cut_instructions"] == 0
    assert "instructions are longer" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*unclosed file|Exception ignored")  # that the library datasets leaves at a broken image
def test_a_broken_image_is_found_before_the_first_step(flags, pairs, tmp_path, capsys):
    for name in ("5.png", "7-after.png"):
        whole = (pairs / "train" / name).read_bytes()
        (pairs / "train" / name).write_bytes(whole[: len(whole) // 2])
    assert main(TRAIN, *flags_for(flags, pairs), "--output_dir", tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 10 pairs cannot be read: " in said
    assert "row 5, before (5.png): it cannot be read as an image" in said and "row 7, after (7-after.png)" in said
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_an_empty_folder_and_one_of_save_to_disk(flags, pairs, tmp_path, capsys):
    (tmp_path / "none" / "train").mkdir(parents=True)
    (tmp_path / "none" / "train" / "metadata.jsonl").write_text("")
    rows = datasets.Dataset.from_dict({"before": [], "after": [], "edit_prompt": []})
    rows.save_to_disk(str(tmp_path / "arrow"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "arrows"))
    for folder, sentence in {
        "none": "expected images with metadata.jsonl, or parquet files, got a folder without any",
        "arrow": "got the output of datasets' save_to_disk; write parquet files instead",
        "arrows": "got the output of datasets' save_to_disk; write parquet files instead",
        "missing": "there is no such folder or file; a data set on the hub is named as in user/name",
    }.items():
        arguments = flags_for(flags, tmp_path / folder)
        assert main(TRAIN, *arguments, "--output_dir", tmp_path / "out") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"train.py: {tmp_path / folder}: ") and sentence in said


def other_pixels(pairs):
    Image.new("RGB", (40, 30)).save(pairs / "train" / "5.png")


CHANGES = {
    "texts": (lambda pairs: with_prompts(pairs, lambda index, prompt: prompt + "!"), "differ in edit_prompt;"),
    "an image": (other_pixels, "differ in before;"),
    "images exchanged": (
        lambda pairs: (pairs / "train" / "1-after.png").write_bytes((pairs / "train" / "2-after.png").read_bytes()),
        "differ in after;",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_run_goes_on_with_its_own_pairs_only(case, flags, pairs, tmp_path, capsys):
    change, sentence = CHANGES[case]
    out, same = tmp_path / "out", flags_for(flags, pairs)
    trained(out, *same)
    change(pairs)
    for finished in (True, False):
        if not finished:
            (out / "metrics.json").unlink()
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        assert main(TRAIN, *same, "--output_dir", out, "--resume_from_checkpoint", "latest") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "the run there began with other pairs: " in said and sentence in said
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
