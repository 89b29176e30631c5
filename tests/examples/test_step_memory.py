"""What a training step takes, by calculation: the same as what tensors with memory take, on small bases."""

import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import step_memory
import step_memory_trace as trace
from loca_vision import LoCAConfig
from loca_vision.layers.targets import find_targets
from step_memory_bases import Base, bases

SMALL = bases(*step_memory.SMALL)
CONFIG = LoCAConfig(n_components=20, targets=("q", "k", "v", "out"))
NAMES = ("sd15", "sdxl", "klein")


@pytest.fixture(scope="module")
def step_of():
    """A traced step of a small base; each is traced once."""
    known = {}

    def traced(name, **how):
        key = (name, *sorted(how.items()))
        if key not in known:
            known[key] = trace.traced(SMALL[name], CONFIG, resolution=128, **how)
        return known[key]

    return traced


@pytest.fixture
def real():
    """The small base with memory, whose adapted weights have gradients, and a step of it at 128 pixels."""

    def made(name):
        with trace._bfloat16():
            model = SMALL[name].build().train()
        trace._learning(find_targets(model, CONFIG.targets))
        return model, partial(trace._step, model, *SMALL[name].call(1, 128))

    return made


def test_the_real_bases_have_their_numbers_of_weights():
    counts = {"sd15": 859_520_964, "sdxl": 2_567_463_684, "klein": 3_875_544_576}
    with torch.device("meta"):
        for name, base in bases().items():
            assert sum(parameter.numel() for parameter in base.build().parameters()) == counts[name]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_and_operations_are_those_of_tensors_with_memory(name, step_of, real):
    model, step = real(name)
    assert trace._bytes(model, step) == (step_of(name).kept, step_of(name).peak)
    forward, both = trace._operations(step)
    assert forward == step_of(name).forward and both > step_of(name).forward + step_of(name).backward


@pytest.mark.parametrize("name", NAMES)
def test_what_waits_for_the_backward_pass_is_what_autograd_saves(name, step_of, real):
    """But for inputs, which were there before, and for the prediction, which nobody but the caller holds."""
    model, _ = real(name)
    own, saved = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    positional, named = SMALL[name].call(1, 128)
    given = [*positional, *named.values(), *named.get("added_cond_kwargs", {}).values()]
    own |= {tensor.data_ptr() for tensor in given if isinstance(tensor, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        error = model(*positional, **named).sample.float().square().mean()
    size = sum(storage.nbytes() for address, storage in saved.items() if address not in own)
    assert error.requires_grad and step_of(name).kept == pytest.approx(size, rel=0.02)


def test_a_step_in_figures(step_of):
    name = "klein"
    step, again, double = step_of(name), step_of(name, checkpointing=True), step_of(name, batch_size=2)
    with torch.device("meta"):
        model = SMALL[name].build()
    shapes = [target.shape for target in find_targets(model, CONFIG.targets)]
    assert step.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert step.built == 2 * sum(map(math.prod, shapes)) and step.trained == 3 * 20 * len(shapes)
    assert step.total == step.weights + step.built + 16 * step.trained + step.peak
    assert again.kept < step.kept / 2 and again.peak < step.peak and again.forward == step.forward
    assert step.backward < again.backward <= step.backward + step.forward
    assert double.forward == 2 * step.forward and double.backward == 2 * step.backward
    assert double.kept == pytest.approx(2 * step.kept, rel=0.05) and double.weights == step.weights
    assert step.added < double.added < 2 * step.added  # building a weight does not depend on the batch


def test_operations_of_one_adapted_product_are_counted_by_hand():
    """Of two layers the first has the gradient of its weight alone, which is LoCA's; the second that of its input, too."""

    class Answer:
        def __init__(self, sample):
            self.sample = sample

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))

        def forward(self, x):
            return Answer(self.two(self.one(x)))

    base = Base("two layers", 64, Block, lambda count, _: ((torch.randn(count, 5, 8),), {}))
    step = trace.traced(base, LoCAConfig(n_components=4, targets=("linear",)), batch_size=3)
    product = 2 * 3 * 5 * 8 * 8
    assert (step.forward, step.backward) == (2 * product, product)


def test_bytes_are_alive_as_long_as_their_tensors():
    kept = torch.zeros(100)
    alive = trace.Alive({kept.untyped_storage()._cdata})
    with alive:
        one = torch.zeros(1000)
        assert alive.now == 4000
        view, two = one[:10], kept + 1
        del one
        assert alive.now == 4400
        del view, two
        assert (alive.now, alive.peak) == (0, 4400)
        kept.add_(1)
        assert alive.now == 0


def test_attention_counts_as_on_a_gpu():
    """Torch has no count of the processor's kernel; two products forward and five backward are those of a GPU's."""
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    counted = FlopCounterMode(display=False, custom_mapping=trace._ATTENTION)
    with counted:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert counted.get_total_flops() == 2 * (2 * 2 * 16 * 16 * 8)
        out.sum().backward()
    assert counted.get_total_flops() == 7 * (2 * 2 * 16 * 16 * 8)


def test_the_command_prints_a_row_without_checkpointing_and_one_with(capsys):
    assert step_memory.main(["--dry_run", "--bases", "klein", "--resolution", "128", "--n_components", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and [line.split(" | ")[1] for line in lines[2:]] == ["no", "yes"]
    assert "FLUX.2 klein 4B, 128" in lines[2] and all(line.count("|") == lines[0].count("|") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch_size", "0"], "batch_size=0"),
        (["--n_components", "-1"], "n_components=-1"),
        (["--resolution", "200"], "resolution=200: expected a multiple of 64"),
        (["--resolution", "64"], "from 128 up"),
        (["--bases", "sd16"], "sd16"),
        (["--dry_run", "--n_components", "3000"], "32 x 32 = 1024 cells"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(arguments, sentence, capsys):
    assert step_memory.main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
