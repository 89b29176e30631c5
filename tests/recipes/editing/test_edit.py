"""Edits of photographs: the right pixels go in, the seed decides, scale 0 is the base, and nothing stays changed."""

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from loca_vision import LoCAConfig, adapters, inject, remove
from loca_vision.data.pair_views import Drawn, View
from loca_vision.data.pairs import Pair
from loca_vision.pipeline.components import models_in
from loca_vision.pipeline.loader import LoCALoaderMixin as Loca
from loca_vision.recipes.editing.edit import Sampling, edit, read_photograph, square
from support import pipelines as tiny
from support.photographs import scene
from support.timm_models import randomise

QUICK = Sampling(steps=2)


def same(one, other):
    return one.size == other.size and one.mode == other.mode == "RGB" and one.tobytes() == other.tobytes()


def pixels_of(image):
    return np.asarray(image, np.int16)


@pytest.fixture
def photo():
    return square(scene(48), 16)


@pytest.fixture
def adapted():
    """A pipeline with an adapter that shows, on its attention and as a whole `conv_in`, and what it was before."""
    pipe, base = tiny.instruct_pix2pix(), tiny.instruct_pix2pix()
    inject(pipe.unet, LoCAConfig(n_components=6, targets=("q", "k", "v", "out")), name="mine")
    randomise(pipe.unet, "mine")
    return pipe, base


@pytest.mark.parametrize("size", [(48, 48), (50, 31), (31, 50), (16, 16), (7, 9)])
def test_a_square_is_the_view_that_training_has(size):
    photo = scene(64).resize(size)
    whole = View(16).pixels(Pair(photo, photo, ""), Drawn())[0].permute(1, 2, 0).numpy()
    assert square(photo, 16).size == (16, 16) and (np.asarray(square(photo, 16)) == whole).all()


def test_a_square_is_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the right
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    image.save(tmp_path / "p.png", exif=exif)
    with Image.open(tmp_path / "p.png") as turned:
        upright = square(turned, 20)
    assert same(upright, square(image.rotate(270, expand=True), 20))
    assert same(square(read_photograph(tmp_path / "p.png"), 20), upright)
    assert square(scene(48).convert("L"), 16).mode == "RGB"


def test_an_edit_is_what_the_pipeline_makes_of_the_same(photo):
    pipe = tiny.instruct_pix2pix()
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "image_guidance_scale": 1.2}
    (wanted,) = pipe("make it red", image=photo, generator=torch.Generator().manual_seed(9), **settings).images
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = edit(pipe, photo, "make it red", Sampling(3, 4.0, 1.2), seed=9)
    assert same(found, wanted) and torch.equal(before, torch.get_rng_state())
    assert same(edit(pipe, photo, "make it red", Sampling(3, 4.0, 1.2), seed=9), found)
    assert not same(edit(pipe, photo, "make it red", Sampling(3, 4.0, 1.2), seed=10), found)


def test_a_scheduler_that_draws_noise_draws_it_by_the_seed_too(photo):
    pipe = tiny.instruct_pix2pix()
    pipe.scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    one, other = (edit(pipe, photo, "a cat", QUICK, seed=3) for _ in range(2))
    assert same(one, other)


def test_scales_of_an_adapter(adapted, photo):
    pipe, base = adapted
    call = partial(edit, photo=photo, prompt="a cat", sampling=QUICK, seed=1)
    full, half, none = (call(pipe, scale=scale) for scale in (1.0, 0.5, 0.0))
    assert same(none, call(base)) and same(none, call(base, scale=0.5)) and same(full, call(pipe))
    assert not same(full, none) and not same(half, full) and not same(half, none)
    Loca.set_loca_adapters(pipe, "mine", 0.5)
    assert same(call(pipe), half)


def test_scale_zero_is_the_base_with_a_whole_tensor_too(adapted, photo, tmp_path):
    pipe, base = adapted
    pipe.unet.conv_in.requires_grad_(True)
    with torch.no_grad():
        pipe.unet.conv_in.weight.add_(0.5)
    Loca.save_loca_weights(pipe, tmp_path)
    loaded = tiny.instruct_pix2pix()
    Loca.load_loca_weights(loaded, tmp_path)
    call = partial(edit, photo=photo, prompt="a cat", sampling=QUICK, seed=1)
    assert same(call(loaded), call(pipe)) and not same(call(loaded), call(base))
    assert same(call(loaded, scale=0.0), call(base)) and same(call(loaded), call(pipe))
    Loca.disable_loca(loaded)
    call(loaded, scale=0.0)
    assert same(call(loaded), call(base))  # still disabled


def test_a_scale_holds_for_text_encoders_alone(photo):
    pipe, base = tiny.instruct_pix2pix(), tiny.instruct_pix2pix()
    inject(pipe.text_encoder, LoCAConfig(n_components=20, targets=("q", "k", "v", "out")), name="mine")
    randomise(pipe.text_encoder, "mine")
    call = partial(edit, photo=photo, prompt="a cat", sampling=QUICK, seed=1)
    assert not same(call(pipe), call(base)) and same(call(pipe, scale=0.0), call(base))
    assert not same(call(pipe, scale=0.5), call(pipe))


def test_everything_is_as_it_was(adapted, photo, capfd):
    pipe, _ = adapted
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.vae.decoder.train()
    pipe.set_progress_bar_config(desc="mine")
    pipe.scheduler.set_timesteps(7)
    scheduler, times = pipe.scheduler, pipe.scheduler.timesteps.clone()
    modes = [module.training for model in models_in(pipe).values() for module in model.modules()]
    attributes = {name: value for name, value in vars(pipe).items() if name != "_internal_dict"}
    learning = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    values = [value.clone() for spectrum in adapters(pipe.unet, "mine").values() for value in spectrum.state_dict().values()]
    for scale in (1.0, 0.5, 0.0):
        edit(pipe, photo, "a cat", QUICK, seed=1, scale=scale)
    with pytest.raises(RuntimeError):  # in the midst of it
        pipe.unet.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError()))
        edit(pipe, photo, "a cat", QUICK, seed=1, scale=0.0)
    assert capfd.readouterr().err == ""
    assert pipe.scheduler is scheduler and torch.equal(scheduler.timesteps, times)
    assert modes == [module.training for model in models_in(pipe).values() for module in model.modules()]
    assert attributes == {name: value for name, value in vars(pipe).items() if name != "_internal_dict"}
    assert learning == {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    after = [value for spectrum in adapters(pipe.unet, "mine").values() for value in spectrum.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(values, after, strict=True))
    assert Loca.get_active_loca_adapters(pipe) == ["mine"]


def test_an_edit_while_training_is_that_of_evaluation(adapted, photo):
    pipe, _ = adapted
    wanted = edit(pipe, photo, "a cat", QUICK, seed=1)
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    pipe.unet.train()
    assert same(edit(pipe, photo, "a cat", QUICK, seed=1), wanted)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps=0: expected a whole number from 1 up"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5: expected a finite number from 1 up"),
        ({"image_guidance_scale": float("nan")}, "image_guidance_scale=nan: expected a finite number from 1 up"),
        ({"image_guidance_scale": True}, "image_guidance_scale=True"),
    ],
)
def test_sampling_is_checked(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**settings)


def test_what_cannot_be_edited_is_refused_first(adapted, photo):
    pipe, _ = adapted
    with pytest.raises(ValueError, match="seed=-1"):
        edit(pipe, photo, "a cat", QUICK, seed=-1)
    with pytest.raises(TypeError, match="prompt must be one text, got a list"):
        edit(pipe, photo, ["a cat"], QUICK, seed=1)
    with pytest.raises(ValueError, match="scale=inf: expected a finite number"):
        edit(pipe, photo, "a cat", QUICK, seed=1, scale=float("inf"))
    with pytest.raises(ValueError, match="15 x 16 pixels: its sides are multiples of 2"):
        edit(pipe, photo.crop((0, 0, 15, 16)), "a cat", QUICK, seed=1)
    Loca.fuse_loca(pipe)
    with pytest.raises(ValueError, match="'mine' is fused"):
        edit(pipe, photo, "a cat", QUICK, seed=1, scale=0.0)
    Loca.unfuse_loca(pipe)
    remove(pipe.unet)


# Photographs from files and addresses


@pytest.fixture
def server(tmp_path):
    """What is in the folder, on an address of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            file = tmp_path / self.path.lstrip("/")
            self.send_response(200 if file.is_file() else 404)
            self.end_headers()
            self.wfile.write(file.read_bytes() if file.is_file() else b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_photographs_come_from_files_and_addresses(tmp_path, server):
    scene(48).save(tmp_path / "p.png")
    assert same(read_photograph(f"{server}/p.png"), scene(48).convert("RGB"))
    assert same(read_photograph(tmp_path / "p.png"), read_photograph(str(tmp_path / "p.png")))


def test_photographs_that_cannot_be_had(tmp_path, server, monkeypatch):
    scene(48).save(tmp_path / "p.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "p.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.png", "text.png"):
        for place in (tmp_path / name, f"{server}/{name}"):
            with pytest.raises(ValueError, match=f"{place}: it cannot be read as an image"):
                read_photograph(place)
    with pytest.raises(FileNotFoundError, match=r"none\.png: there is no such image"):
        read_photograph(tmp_path / "none.png")
    with pytest.raises(ValueError, match="expected the file of a photograph"):
        read_photograph(tmp_path)
    with pytest.raises(OSError, match=r"none\.png: it cannot be fetched \(404"):
        read_photograph(f"{server}/none.png")
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:1/p\.png: it cannot be fetched"):
        read_photograph("http://127.0.0.1:1/p.png")
    monkeypatch.setattr("loca_vision.recipes.editing.edit.MOST_BYTES", 100)
    with pytest.raises(OSError, match="it has more than 100 bytes"):
        read_photograph(f"{server}/p.png")
