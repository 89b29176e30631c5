"""The commands of `loca-vision`: to add one, add a line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command, whose module is imported when it is used.

    Args:
        about: one line for the list of commands.
        module: the name of its module in loca_vision.
        settings: the module's settings dataclass, which tyro reads; empty if the module has a `main` that reads the words
            itself, as `main(words, prog=...)`.
        run: the module's function that takes those settings. If it returns a text, that is printed.
        extra: the extra that installs the packages it needs, as in `pip install 'loca-vision[EXTRA]'`.
    """

    about: str
    module: str
    settings: str = ""
    run: str = ""
    extra: str = "demo"


GROUPS: dict[str, dict[str, Command]] = {
    "Try": {
        "demo": Command("train LoCA on real images, and compare it with a linear probe", "commands.demo", "Demo", "run"),
        "app": Command("open a page on which to look at an adapter", "commands.app.command", "App", "run"),
    },
    "Train": {
        "train-classifier": Command(
            "fine-tune an image classifier of timm, and test it", "recipes.classification.train", extra="train"
        ),
        "train-edit": Command("teach Stable Diffusion an edit (InstructPix2Pix)", "recipes.editing.train", extra="edit"),
        "train-image": Command(
            "teach a pipeline a subject (DreamBooth), a style or a concept", "recipes.text_to_image.train", extra="edit"
        ),
        "report": Command("put runs of train-classifier into a table", "recipes.classification.table", extra="train"),
    },
    "Use": {
        "predict": Command(
            "classify images with a trained adapter", "recipes.classification.predict", "Predict", "predict", "train"
        ),
        "evaluate": Command(
            "test a classifier, class by class", "recipes.classification.evaluate", "Evaluate", "evaluate", "train"
        ),
        "evaluate-edit": Command(
            "edit photographs with adapters, and measure the edits", "commands.evaluate_edit", extra="edit"
        ),
    },
    "Files": {
        "inspect": Command("say what is in an adapter or a LoRA", "commands.inspect_file", "Inspect", "inspect"),
        "convert": Command("turn a LoRA or an adapter into LoCA or LoRA", "commands.convert", "Convert", "convert"),
        "extract": Command(
            "make an adapter of a fine-tuned checkpoint minus its base", "commands.convert", "Extract", "extract"
        ),
        "merge": Command("fold an adapter or a LoRA into weights", "commands.merge", "Merge", "merged"),
        "combine": Command("make one adapter of several", "commands.combine", "Combine", "combine"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
