"""Damaged adapter files: three hundred of those that examples/hardening/mutate_files.py makes."""

from __future__ import annotations

from pathlib import Path

from mutate_files import Mutation, facts, load_or_refuse, sound_file, tiny


def test_damaged_files_are_loaded_or_refused(tmp_path: Path) -> None:
    good, file, model = sound_file(tmp_path), tmp_path / "damaged.safetensors", tiny()
    before, loaded = facts(model), 0
    for seed in range(300):
        file.write_bytes(Mutation(seed)(good))
        try:
            loaded += load_or_refuse(model, file, before)
        except BaseException as error:
            raise AssertionError(f"Mutation({seed})") from error
    assert loaded > 0, "no mutation left the file sound: nothing but refusals was tried"


def test_finite_coefficients_whose_transform_overflows_are_refused(tmp_path: Path) -> None:
    """Damages 1169 and 2107: a coefficient just below the largest float32 made an update of infinities."""
    good, file, model = sound_file(tmp_path), tmp_path / "damaged.safetensors", tiny()
    for seed in (1169, 2107):
        file.write_bytes(Mutation(seed)(good))
        assert not load_or_refuse(model, file, facts(model))
