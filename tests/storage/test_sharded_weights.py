"""Checkpoints in shards: read one tensor at a time, checked against the index, written completely or not at all."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel

from loca_vision.storage.safetensors_file import Entry
from loca_vision.storage.sharded_weights import open_weights, write_weights_files
from support.pipelines import unet
from support.timm_models import tiny


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {f"layer.{i}.weight": torch.randn(6, i + 1, generator=generator) for i in range(8)}
    made |= {"half": torch.randn(5, generator=generator).bfloat16(), "count": torch.tensor(3), "empty": torch.empty(0, 4)}
    return made | {"f16": torch.ones(3, 1).half(), "flags": torch.tensor([True, False]), "f64": torch.ones(2).double()}


def entries_of(state, folder):
    safetensors.torch.save_file(state, folder / "entries.safetensors")
    with open_weights(folder / "entries.safetensors") as weights:
        found = weights.entries
    (folder / "entries.safetensors").unlink()
    return found


def write(path, state, tmp_path, **settings):
    return write_weights_files(path, entries_of(state, tmp_path), state.__getitem__, **settings)


def check(path, state):
    with open_weights(path) as weights:
        assert weights.entries.keys() == state.keys()
        for name, tensor in state.items():
            read = weights.tensor(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)


@pytest.mark.parametrize("size", [1, 60, 200, 10**9])
def test_what_is_written_is_read(size, tmp_path):
    folder = write(tmp_path / "out", tensors(), tmp_path, shard_size=size)
    check(folder, tensors())
    files = sorted(folder.glob("*.safetensors"))
    theirs = {name: t for file in files for name, t in safetensors.torch.load_file(file).items()}
    assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors().items())
    for file in files:
        held = safetensors.torch.load_file(file).values()
        assert sum(t.numel() * t.element_size() for t in held) <= size or sum(t.numel() > 0 for t in held) == 1
    assert (folder / "model.safetensors.index.json").exists() == (size < 10**9)


def test_a_single_file_whatever_its_size(tmp_path):
    file = write(tmp_path / "x.safetensors", tensors(), tmp_path, shard_size=1)
    check(file, tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_umask_holds_for_folders_and_files(tmp_path):
    before = os.umask(0o027)
    try:
        folder = write(tmp_path / "out", tensors(), tmp_path)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750 and (folder / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_diffusers_reads_what_is_written_and_writes_what_is_read(tmp_path):
    model = unet()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    config = (tmp_path / "theirs" / "config.json").read_bytes()
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    check(tmp_path / "theirs", model.state_dict())
    with open_weights(tmp_path / "theirs") as weights:
        write_weights_files(
            tmp_path / "ours",
            weights.entries,
            lambda name: weights.tensor(name) * 2,
            stem="diffusion_pytorch_model",
            shard_size=30_000,
            extra={"config.json": config},
        )
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[name], tensor * 2) for name, tensor in model.state_dict().items())


def test_timm_reads_what_is_written(tmp_path):
    import timm

    model = tiny("vit")
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    timm.models.load_checkpoint(model, str(write(tmp_path / "x.safetensors", state, tmp_path)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    state = {str(i): torch.zeros(256, 1024) for i in range(32)}  # a MiB each
    file = write(tmp_path / "x.safetensors", state, tmp_path)
    del state
    tracemalloc.start()
    with open_weights(file) as weights:
        write_weights_files(tmp_path / "out", weights.entries, weights.tensor, shard_size=16 * 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


# Refused


def sharded(folder):
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    safetensors.torch.save_file({"b": torch.ones(3)}, folder / "two.safetensors")
    return {"a": "one.safetensors", "b": "two.safetensors"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"a": "../one.safetensors"}, "not the name of a safetensors file next to it"),
        ({"a": "/one.safetensors"}, "not the name of a safetensors file"),
        ({"a": "x\\one.safetensors"}, "not the name of a safetensors file"),
        ({"a": "one\0.safetensors"}, "not the name of a safetensors file"),
        ({"a": "one.bin"}, "not the name of a safetensors file"),
        ({"a": ".."}, "not the name of a safetensors file"),
        ({"a": 3}, "no weight_map"),
        ({"a": "two.safetensors"}, "two.safetensors has no tensor 'a'"),
        ({"c": "two.safetensors"}, "two.safetensors has no tensor 'c'"),
        ({"a": "none.safetensors"}, "none.safetensors: there is no such file"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(change, sentence, tmp_path):
    places = sharded(tmp_path) | change
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises((ValueError, FileNotFoundError), match=sentence), open_weights(tmp_path):
        pass


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}', "{", '{"weight_map": 1}']
)
def test_what_is_no_index_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: "), open_weights(tmp_path):
        pass


def test_a_tensor_the_index_leaves_out_or_has_elsewhere_is_refused(tmp_path):
    places = sharded(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with (
        pytest.raises(ValueError, match=r"two.safetensors has a tensor 'a' that the index does not say"),
        open_weights(tmp_path),
    ):
        pass


def test_links_may_lead_to_the_blobs_of_a_snapshot_only(tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for name in sharded(blobs).values():
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    check(snapshot, {"a": torch.ones(2), "b": torch.ones(3)})
    (snapshot / "one.safetensors").unlink()
    sharded(tmp_path)
    (snapshot / "one.safetensors").symlink_to(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"one.safetensors is a link that leaves the folder"), open_weights(snapshot):
        pass


def test_what_to_read_must_be_plain(tmp_path):
    with pytest.raises(FileNotFoundError, match="no safetensors weights"), open_weights(tmp_path):
        pass
    (tmp_path / "model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"model.bin is there, but a pickle"), open_weights(tmp_path):
        pass
    with pytest.raises(ValueError, match="ends like a pickle"), open_weights(tmp_path / "model.bin"):
        pass
    sharded(tmp_path)
    with pytest.raises(ValueError, match=r"there are one.safetensors, two.safetensors in that folder"), open_weights(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="no such file"), open_weights(tmp_path / "x.safetensors"):
        pass


def test_a_file_cut_short_while_open_is_an_error(tmp_path):
    file = write(tmp_path / "x.safetensors", {"a": torch.ones(1000)}, tmp_path)
    with pytest.raises(ValueError, match=r"x.safetensors: it was changed while it was read"), open_weights(file) as weights:
        os.truncate(file, 2000)
        weights.tensor("a")


# Nothing is lost, nothing half written


def test_what_is_there_is_replaced_on_request_only(tmp_path):
    for out in (tmp_path / "out", tmp_path / "x.safetensors"):
        write(out, {"a": torch.ones(2)}, tmp_path)
        with pytest.raises(FileExistsError, match="overwritten"):
            write(out, {"b": torch.ones(2)}, tmp_path)
        check(out, {"a": torch.ones(2)})
        write(out, {"b": torch.ones(2), "c": torch.ones(2)}, tmp_path, overwrite=True, shard_size=8)
        check(out, {"b": torch.ones(2), "c": torch.ones(2)})
    write(tmp_path / "out", {"a": torch.ones(2)}, tmp_path, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "x.safetensors"}


@pytest.mark.parametrize("name", ["config.json", "theirs.safetensors", "folder"])
def test_files_of_others_are_never_overwritten(name, tmp_path):
    folder = write(tmp_path / "out", {"a": torch.ones(2)}, tmp_path)
    if name == "folder":
        (folder / name).mkdir()
    else:
        safetensors.torch.save_file({"z": torch.ones(1)}, folder / name)
    with pytest.raises(FileExistsError, match=f"{name} is there, which was not written here"):
        write(folder, {"b": torch.ones(2)}, tmp_path, overwrite=True)
    check(folder / "model.safetensors", {"a": torch.ones(2)})
    if name == "config.json":
        write(folder, {"b": torch.ones(2)}, tmp_path, overwrite=True, extra={"config.json": b"{}"})
        assert (folder / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("out", ["out", "x.safetensors"])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_fault_on_the_way_leaves_what_was_there(error, out, there, tmp_path):
    if there:
        write(tmp_path / out, {"a": torch.ones(2)}, tmp_path)

    def failing(name):
        if name == "c":
            raise error
        return torch.ones(2)

    entries = entries_of({"b": torch.ones(2), "c": torch.ones(2)}, tmp_path)
    with pytest.raises(type(error)):
        write_weights_files(tmp_path / out, entries, failing, shard_size=8, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ([out] if there else [])
    if there:
        check(tmp_path / out, {"a": torch.ones(2)})


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path / "out", {"a": torch.ones(2)}, tmp_path)
    entries = entries_of({"b": torch.ones(2)}, tmp_path)
    rename = Path.rename

    def once(self, target):
        if ".tmp-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OSError, match="no"):
        write_weights_files(tmp_path / "out", entries, lambda _: torch.ones(2), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check(tmp_path / "out", {"a": torch.ones(2)})


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path):
    for wrong in (torch.ones(3), torch.ones(2).half(), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"a: expected F32 \(2,\), got F(32|16)"):
            write_weights_files(tmp_path / "out", {"a": Entry("F32", (2,), 0, 8)}, lambda _, wrong=wrong: wrong)
    with pytest.raises(ValueError, match="no tensor"):
        write_weights_files(tmp_path / "out", {}, lambda _: torch.ones(2))
    with pytest.raises(ValueError, match="shard_size=0"):
        write(tmp_path / "out", {"a": torch.ones(2)}, tmp_path, shard_size=0)
    with pytest.raises(ValueError, match="to a safetensors file, or to a folder"):
        write(tmp_path / "out.bin", {"a": torch.ones(2)}, tmp_path)
    with pytest.raises(ValueError, match=r"no room for config.json"):
        write(tmp_path / "x.safetensors", {"a": torch.ones(2)}, tmp_path, extra={"config.json": b""})
    assert list(tmp_path.iterdir()) == []
