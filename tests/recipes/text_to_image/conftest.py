"""Fixtures of the tests in recipes/text_to_image/."""

import pytest

from support.image_training import FAMILIES, FEW, captioned, photographs


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """The folder of a tiny pipeline of a family; each is made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("bases") / family
            FAMILIES[family]().save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def subject(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("images") / "dog")


@pytest.fixture(scope="session")
def style(tmp_path_factory):
    return captioned(tmp_path_factory.mktemp("images") / "style")


@pytest.fixture(scope="session")
def dreambooth(base_of, subject):
    """Four steps of two images of a subject with Stable Diffusion, without pictures."""
    named = ("--instance_data_dir", subject, "--instance_prompt", "a dog", "--center_crop")
    return ("--pretrained_model_name_or_path", base_of("sd"), *named, *FEW)
