"""save_adapter and load_adapter: the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from loca_vision import load_adapter, save_adapter
from loca_vision.formats.adapter_file import FILE_NAME
from support.adapter_files import PROJECTIONS, output, tiny, trained


def test_a_repository_is_loaded_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake hub: what `hf_hub_download` is asked for, from a folder."""
    source = trained()
    save_adapter(source, tmp_path / "repository")
    asked = []

    def fetched(repository: str, name: str, **named: Any) -> str:
        asked.append((repository, name))
        return str(tmp_path / "repository" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    model = tiny()
    assert load_adapter(model, "user/pets") == PROJECTIONS
    assert asked == [("user/pets", FILE_NAME)]
    assert torch.equal(output(model), output(source))


@pytest.mark.parametrize("path", ["nowhere/pets.safetensors", "./user/pets", "a/b/c", Path("user/pets")], ids=str)
def test_what_can_be_no_repository_is_looked_for_here_only(
    path: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(FileNotFoundError):
        load_adapter(tiny(), path)


def test_a_folder_goes_before_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    save_adapter(trained(), "user/pets")
    assert load_adapter(tiny(), "user/pets") == PROJECTIONS
