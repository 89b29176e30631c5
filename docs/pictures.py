"""The pictures of the method pages, from the library itself; each has less than 300 kB.

python docs/pictures.py
"""

from __future__ import annotations

import math
from pathlib import Path

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from loca_vision import (
    FourierFTConfig,
    LoCAConfig,
    LoRAConfig,
    SDCTFTConfig,
    SeLoRAConfig,
    SHiRAConfig,
    WaveFTConfig,
    adapters,
    inject,
)
from loca_vision.dct import dct2, dct_matrix, idct2
from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.patches import scattered

FOLDER = Path(__file__).parent / "images"
SIZE, COMPONENTS, PROJECTION = 96, 120, "blocks.0.attn.q"
ENERGY, RANDOM = "#d1603d", "#0b6e99"


def vit() -> nn.Module:
    """One block of width 96 whose query has the spectrum of a smooth matrix: amplitudes fall with the frequency."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=SIZE, depth=1, num_classes=2)
    index = torch.arange(SIZE, dtype=torch.float32)
    distance = (index[:, None].square() + index.square()).sqrt()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:SIZE] = idct2(torch.randn(SIZE, SIZE) / (1 + distance / 8))
    return model


def update_of(config: object) -> tuple[nn.Module, Tensor]:
    """An update with drawn numbers in the place of its zeros, and the weight it is for."""
    model = vit()
    weight = model.blocks[0].attn.qkv.weight[:SIZE].detach().clone()
    inject(model, config)
    update = adapters(model)[PROJECTION]
    with torch.no_grad():
        for parameter in update.parameters():
            if not parameter.any():
                parameter.normal_()
    return update, weight


def matrix(axes: Axes, values: Tensor, title: str) -> None:
    limit = float(values.detach().abs().max())
    axes.imshow(values.detach().numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    _finish(axes, title)


def cells(axes: Axes, where: Tensor, title: str, colour: str = RANDOM) -> None:
    axes.scatter(where[:, 1], where[:, 0], s=7, color=colour, linewidths=0)
    axes.set_xlim(-1, SIZE)
    axes.set_ylim(SIZE, -1)
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(2.7 * count, 2.9), layout="constrained")
    return figure, list(figure.subplots(1, count))


def loca() -> Figure:
    update, _ = update_of(LoCAConfig(n_components=COMPONENTS))
    figure, (spectrum, steps, atom, delta) = panels(4)
    cells(spectrum, update.cells, f"S: {COMPONENTS} cells of {SIZE} x {SIZE}")
    near = update.cells[update.cells.float().sub(SIZE / 2).norm(dim=1).argmin()].tolist()
    steps.scatter([near[1]], [near[0]], s=90, color=RANDOM)
    for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        steps.scatter([near[1] + right], [near[0] + down], s=60, facecolors="none", edgecolors=ENERGY)
    steps.set_xlim(near[1] - 3.5, near[1] + 3.5)
    steps.set_ylim(near[0] + 3.5, near[0] - 3.5)
    _finish(steps, "a location and its four neighbours")
    rows = dct_matrix(SIZE)
    matrix(atom, torch.outer(rows[3], rows[5]), "the atom of cell (3, 5)")
    matrix(delta, update.delta(), "the update")
    return figure


def sdctft() -> Figure:
    update, weight = update_of(SDCTFTConfig(n_components=COMPONENTS))
    figure, (energy, chosen, delta) = panels(3)
    spectrum = dct2(weight)
    energy.imshow(spectrum.abs().clamp(min=1e-3).log10().numpy(), cmap="magma", interpolation="nearest")
    _finish(energy, "log |DCT(W0)| and the bands")
    reach = math.hypot(SIZE - 1, SIZE - 1)
    angle = torch.linspace(0, math.pi / 2, 100)
    for axes, colour in ((energy, "white"), (chosen, "#8c8c8c")):
        for part in (1 / 3, 2 / 3):
            axes.plot(part * reach * angle.cos(), part * reach * angle.sin(), color=colour, linewidth=1)
    where = update.cells
    amplitude = spectrum.abs()[where[:, 0], where[:, 1]]
    distance = where.float().norm(dim=1) / reach * 3
    strong = torch.zeros(len(where), dtype=torch.bool)
    for band in range(3):
        inside = torch.nonzero(distance.long().clamp(max=2) == band).flatten()
        strong[inside[amplitude[inside].argsort(descending=True)[: round(0.7 * len(inside))]]] = True
    cells(chosen, where[~strong], "")
    cells(chosen, where[strong], "cells: by energy (red), at random (blue)", ENERGY)
    energy.set_xlim(-0.5, SIZE - 0.5)
    energy.set_ylim(SIZE - 0.5, -0.5)
    matrix(delta, update.delta(), "the update")
    return figure


def fourierft() -> Figure:
    update, _ = update_of(FourierFTConfig(n_components=COMPONENTS))
    figure, (spectrum, atom, delta) = panels(3)
    cells(spectrum, update.cells, f"F: {COMPONENTS} cells of {SIZE} x {SIZE}")
    index = torch.arange(SIZE)
    matrix(atom, torch.cos(2 * math.pi * (3 * index[:, None] + 5 * index) / SIZE), "the atom of cell (3, 5)")
    matrix(delta, update.delta(), "the update")
    return figure


def lora() -> Figure:
    update, _ = update_of(LoRAConfig(r=4, alpha=4))
    figure, (up, down, delta) = panels(3)
    matrix(up, update.up, f"B: {SIZE} x 4")
    matrix(down, update.down, f"A: 4 x {SIZE}")
    matrix(delta, update.delta(), "the update B A, of rank 4")
    return figure


def selora() -> Figure:
    rank = 16
    update, _ = update_of(SeLoRAConfig(r=rank, alpha=rank, eta=0.5, basis="haar"))
    figure, (sparse, up, down, delta) = panels(4)
    spectrum = torch.zeros(SIZE * rank)
    spectrum[update.up_cells] = update.up_coefficients.detach()
    factors = update.factors(1.0)
    matrix(sparse, spectrum.view(SIZE, rank), "spectrum of B, half of it zero")
    matrix(up, factors[0], f"B: {SIZE} x {rank}, its Haar transform")
    matrix(down, factors[1], f"A: {rank} x {SIZE}, likewise")
    matrix(delta, update.delta(), f"the update B A, of rank {rank}")
    return figure


def waveft() -> Figure:
    update, _ = update_of(WaveFTConfig(n_components=COMPONENTS, wavelet="db2"))
    figure, (spectrum, atom, delta) = panels(3)
    cells(spectrum, update.cells, f"S: {COMPONENTS} cells of {SIZE} x {SIZE}")
    for line in (spectrum.axhline, spectrum.axvline):
        line(SIZE / 2, color="#8c8c8c", linewidth=1)
    one = update.patches(Cells(torch.tensor([[12, 70]]), update.shape))
    near = scattered(torch.ones(1), one, update.shape)[20:32, 38:50]
    matrix(atom, near, "an atom of db2, near")
    matrix(delta, update.delta(), "the update")
    return figure


def shira() -> Figure:
    update, weight = update_of(SHiRAConfig(n_components=COMPONENTS))
    figure, (at_random, by_size, delta) = panels(3)
    cells(at_random, update.cells, f'{COMPONENTS} entries, mask="random"')
    largest = weight.abs().flatten().topk(COMPONENTS).indices
    cells(by_size, torch.stack([largest // SIZE, largest % SIZE], 1), 'mask="magnitude"', ENERGY)
    matrix(delta, update.delta(), "the update")
    return figure


if __name__ == "__main__":
    for draw in (loca, sdctft, fourierft, lora, selora, waveft, shira):
        draw().savefig(FOLDER / f"{draw.__name__}.png", dpi=110)
