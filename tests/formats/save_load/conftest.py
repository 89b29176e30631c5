"""Fixtures of the tests in formats/save_load/."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from loca_vision import save_adapter
from support.adapter_files import NAME, facts, tiny, trained


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model that no test here may change, since all loads into it are refused."""
    return tiny()


@pytest.fixture(scope="module")
def untouched(model: nn.Module) -> dict[str, Any]:
    return facts(model)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save_adapter(trained(), tmp_path_factory.mktemp("good") / NAME).read_bytes()
