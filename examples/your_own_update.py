"""Define your own update with everything that LoCA offers: here a sum of Kronecker products, full rank from few numbers.

    python examples/your_own_update.py

The trainers can use it from this file alone: its name becomes a method, and its fields become settings.

    python examples/image_classification/train.py --method kronecker --import examples/your_own_update.py \
        --set terms=8 --set block=4 --dataset digits --output_dir runs/kronecker
    python examples/image_classification/evaluate.py --adapter runs/kronecker --import examples/your_own_update.py

An installed package needs no --import if it has an entry point in the group loca_vision.methods:
`kronecker = "its.module"`.
"""

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import ClassVar

import timm
import torch
from torch import Generator, Tensor, nn

from loca_vision import AdapterConfig, Projection, Update, inject, kind, load_adapter, parameter_groups, save_adapter


class Kronecker(Update):
    """sum_k L_k (x) R_k, for L_k (p / block, q / block) and R_k (block, block)."""

    def __init__(self, shape: tuple[int, int], terms: int, block: int) -> None:
        super().__init__(shape)
        self.left = nn.Parameter(torch.zeros(terms, shape[0] // block, shape[1] // block))
        self.right = nn.Parameter(torch.zeros(terms, block, block))

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        return strength * torch.einsum("kab,kcd->acbd", self.left, self.right).reshape(self.shape)


@kind  # registers the method so that its files can be read
@dataclass(frozen=True)
class KroneckerConfig(AdapterConfig):
    method: ClassVar[str] = "kronecker"
    title: ClassVar[str] = "a sum of Kronecker products"  # in model cards and pictures; this and the next two are optional
    summary: ClassVar[str] = "sums of Kronecker products"  # in --help
    lr: ClassVar[float] = 1e-2  # the default of --lr
    targets: tuple[str, ...] = ("q", "v")
    terms: int = 4
    block: int = 8
    seed: int = 0

    def build(self, shape: tuple[int, int]) -> Kronecker:
        if shape[0] % self.block or shape[1] % self.block:
            raise ValueError(f"block={self.block}: it does not divide {shape[0]} x {shape[1]}")
        return Kronecker(shape, self.terms, self.block)

    def initialize(self, update: Kronecker, projection: Projection, generator: Generator) -> None:
        nn.init.normal_(update.right, std=0.1, generator=generator)  # left factors stay zero: the update starts at zero


def model() -> nn.Module:
    torch.manual_seed(0)
    vit: nn.Module = timm.create_model("test_vit", img_size=32, num_classes=10).eval()
    return vit


def main() -> None:
    vit, (images, labels) = model(), (torch.randn(32, 3, 32, 32), torch.arange(32) % 10)
    print(len(inject(vit, KroneckerConfig())), "projections; at first the same:", torch.equal(vit(images), model()(images)))
    groups = parameter_groups(vit, lr=1e-2)
    print("trained:", {group["name"]: sum(p.numel() for p in group["params"]) for group in groups})
    optimiser = torch.optim.AdamW(groups)
    for _ in range(20):
        loss = nn.functional.cross_entropy(vit(images), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    print(f"loss after 20 steps: {loss.item():.3f}")
    with TemporaryDirectory() as folder:
        fresh = model()
        load_adapter(fresh, save_adapter(vit, folder))
    with torch.no_grad():
        print("loaded, the same logits:", torch.equal(fresh(images), vit(images)))


if __name__ == "__main__":  # train.py imports this file, which must only register the kind
    main()
