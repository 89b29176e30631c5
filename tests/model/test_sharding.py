"""FSDP: two processes that share a model out train the adapter of one, and what cannot work is refused."""

import os
import signal
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from loca_vision import (
    AlternatingSchedule,
    LoCAConfig,
    LoRAConfig,
    inject,
    load_adapter,
    parameter_groups,
    remove,
    save_adapter,
)
from loca_vision.functional.cost_model import using
from loca_vision.model.traversal import all_updates
from support import transformers_models as hf
from support.forks import fork, joined
from support.timm_models import tiny

forks = pytest.mark.skipif(sys.platform == "win32" or torch.cuda.is_available(), reason="no fork there, or none with CUDA")
pytestmark = [
    forks,
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONFIGS = {
    "loca": LoCAConfig(n_components=40, targets=("q", "v", "out", "fc1")),
    "lora": LoRAConfig(r=4, alpha=4.0),
    "dora": LoRAConfig(r=4, alpha=4.0, use_dora=True),
}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3


def adapted(method, make=lambda: tiny("vit")):
    """With an effect, so that locations have gradients from the first step."""
    model = make()
    head = () if hasattr(model, "get_classifier") else ("classifier",)
    inject(model, CONFIGS[method], modules_to_save=head)
    torch.manual_seed(5)
    with torch.no_grad():
        for update in all_updates(model):
            for parameter in update.trainable():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def optimizer_of(model):
    return torch.optim.SGD(parameter_groups(model, lr=0.5, location_lr=0.05, head_lr=0.1), momentum=0.9)


def train(model, optimizer, rank=0, processes=1):
    """Eight steps over two periods of the schedule, with an evaluation between; each process has its share of the batch."""
    schedule = AlternatingSchedule(model, coefficient_steps=2, location_steps=2, learning_steps=6)
    for step in range(8):
        answer = model.train()(IMAGES[rank::processes])
        loss = nn.functional.cross_entropy(getattr(answer, "logits", answer), LABELS[rank::processes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 3:
            evaluate(model)


@torch.no_grad()
def evaluate(model):
    answer = model.eval()(IMAGES)
    return getattr(answer, "logits", answer)


def shard(model):
    for block in getattr(model, "blocks", None) or model.vit.layers:
        fully_shard(block)
    return fully_shard(model)


def together(folder, work, processes=2):
    """Run `work(rank)` in forks that hear of each other; this process never trains, after which forks may hang."""

    def process(rank):
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
        signal.alarm(60)  # no process waits for ever for one that has failed
        store = dist.FileStore(str(folder / f"store{processes}"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        try:
            work(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # at once, so that the other one hears of it
        dist.destroy_process_group()
        return 0

    logs = [folder / f"log{rank}of{processes}.txt" for rank in range(processes)]
    children = [fork(lambda rank=rank: process(rank), logs[rank]) for rank in range(processes)]
    ends = [joined(child) for child in children]
    assert not any(ends), "\n".join(log.read_text() for log in logs)


def assert_same(folder, method, make=lambda: tiny("vit")):
    """The saved file is that of one process, and so is what a new model does with it."""

    def work(_):
        model = adapted(method, make)
        train(model, optimizer_of(model))
        save_adapter(model, folder / "alone")

    together(folder, work, processes=1)
    alone, loaded = make(), make()
    load_adapter(alone, folder / "alone")
    load_adapter(loaded, folder / "saved")
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=1e-5, msg=name)
    torch.testing.assert_close(evaluate(loaded), evaluate(alone), rtol=0, atol=1e-4)
    assert (evaluate(loaded) - evaluate(make())).abs().max() > 0.1


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "at once"])
@pytest.mark.parametrize("method", CONFIGS)
def test_two_processes_train_the_adapter_of_one(method, blocks, tmp_path):
    def work(rank):
        model = adapted(method)
        (shard if blocks else fully_shard)(model)
        train(model, optimizer_of(model), rank, 2)
        before = evaluate(model)
        save_adapter(model, tmp_path / "saved")
        assert (tmp_path / "saved" / "pytorch_loca_weights.safetensors").exists()  # for every process
        assert torch.equal(evaluate(model), before)

    together(tmp_path, work)
    assert_same(tmp_path, method)


def test_parts_of_what_is_built_together(tmp_path):
    """Also of parts that stay whole between passes: each is done with its gradients before another has any."""

    def gradients(rank, kept, synchronised):
        model = adapted("loca")
        parts = [fully_shard(block, reshard_after_forward="forward" not in kept) for block in model.blocks]
        parts.append(fully_shard(model))
        model.set_reshard_after_backward("backward" not in kept)
        for step in range(3):
            model.set_requires_gradient_sync(step >= 3 - synchronised)
            (model(IMAGES[rank::2]).square().mean() + model(IMAGES[rank::4]).mean()).backward()
        for part in parts:
            part.reshard()
        return [parameter.grad.full_tensor() for parameter in model.parameters() if parameter.requires_grad]

    def work(rank):
        for setting in (("", 3), ("forward", 3), ("backward", 3), ("forward and backward", 1)):
            with using("whole"):
                wanted = gradients(rank, *setting)
            with using("together"):
                found = gradients(rank, *setting)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        half = adapted("loca")
        fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with using("together"), pytest.raises(RuntimeError, match=r"locations are in torch\.bfloat16.* use autocast"):
            half(IMAGES)

    together(tmp_path, work)


@pytest.mark.parametrize("method", ["loca", "lora"])
def test_through_accelerate(method, tmp_path):
    """On processors accelerate takes DistributedDataParallel in the place of FSDP, unless it is told otherwise."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    def work(rank):
        accelerator = Accelerator(cpu=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        model = adapted(method)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        train(model, optimizer, rank, 2)
        save_adapter(model, tmp_path / "saved")

    together(tmp_path, work)
    assert_same(tmp_path, method)


def test_one_process_saves_a_model_of_transformers_by_its_state_dict(tmp_path):
    """As transformers' Trainer does: all processes gather, and the first alone calls `save_pretrained`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    def work(rank):
        model = shard(adapted("loca", hf.tiny))
        train(model, optimizer_of(model), rank, 2)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(tmp_path / "saved", state_dict=state)

    together(tmp_path, work)
    assert_same(tmp_path, "loca", hf.tiny)
    again = adapted("loca", hf.tiny)
    again.load_state_dict(_weights(tmp_path / "saved"))
    fresh = hf.tiny()
    load_adapter(fresh, tmp_path / "saved")
    torch.testing.assert_close(evaluate(again), evaluate(fresh), rtol=0, atol=1e-5)


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_what_cannot_work_is_refused(tmp_path):
    def work(rank):
        partly = adapted("loca")
        for block in partly.blocks:
            fully_shard(block)
        for refused in (AlternatingSchedule, lambda model: parameter_groups(model, lr=1.0)):
            with pytest.raises(ValueError, match=r"head\.weight is not sharded, and other parameters are: call fully_shard on"):
                refused(partly)
        model = shard(adapted("loca"))
        evaluate(model)  # which leaves the outermost part whole
        with pytest.raises(ValueError, match="before any call of the model"):
            parameter_groups(model, lr=1.0)
        model = shard(adapted("loca"))
        with pytest.raises(ValueError, match="sharded by fully_shard: inject or load adapters before"):
            inject(model, CONFIGS["lora"], "second")
        with pytest.raises(ValueError, match="sharded by fully_shard: save the adapter"):
            remove(model)
        with pytest.raises(ValueError, match="or shard it with fully_shard, before its schedule"):
            AlternatingSchedule(adapted("loca"))
        half = adapted("loca")
        fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(RuntimeError, match=r"locations are in torch\.bfloat16.* use autocast"):
            half(IMAGES)
        with pytest.raises(RuntimeError, match="use fully_shard in the place of FullyShardedDataParallel"):
            FullyShardedDataParallel(adapted("loca"), use_orig_params=True, device_id=torch.device("cpu"))
        fsdp1 = FullyShardedDataParallel(adapted("lora", hf.tiny), use_orig_params=True, device_id=torch.device("cpu"))
        for refused in (AlternatingSchedule, lambda model: parameter_groups(model, lr=1.0)):
            with pytest.raises(ValueError, match="use fully_shard, which is FSDP 2"):
                refused(fsdp1)

    together(tmp_path, work)
