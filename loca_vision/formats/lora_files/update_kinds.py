"""Make updates from the tensors of one layer: LoRA, LoCon, LoHa, LoKr, full differences, FourierFT; with or without DoRA.

The formulas are those of LyCORIS (Yeh et al., arXiv 2309.14859) and of peft, against which the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.module_update import MOST_CELLS, Magnitude, ModuleUpdate

Scale = Callable[[int | None], float]  # the factor of an update, given its rank; None for two full factors
_HADA, _HADA_CORES = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}
_KRON = (
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
)
_BESIDE = {"alpha", "dora_scale", "magnitude", "bias", "diff_b"}  # these come with any kind


def update_of(name: str, parts: Mapping[str, Tensor], scale: Scale) -> ModuleUpdate:
    """Return the update that a layer's tensors make, given their roles from `role_of`.

    Args:
        name: the name of the layer, for error messages.
        parts: floating-point numbers, all finite.
        scale: returns the scale for a rank, whatever its source.

    Raises:
        ValueError: the set of tensors is incomplete, or their shapes do not fit each other.
    """
    roles = set(parts) - _BESIDE
    if roles in ({"down", "up"}, {"down", "up", "mid"}):
        update = _low_rank(parts, scale)
    elif roles in (_HADA, _HADA | _HADA_CORES):
        update = _hadamard(parts, scale)
    elif roles in _KRON:
        update = _kronecker(parts, scale)
    elif roles == {"diff"}:
        update = _difference(parts["diff"])
    else:
        raise ValueError(_what_is_missing(name, roles))
    if math.prod(update.shape) > MOST_CELLS:
        raise ValueError(f"the update of {name} is {update.shape[0]} x {update.shape[1]}, more than 2**31 cells")
    return _with_magnitude(update, parts)


def _what_is_missing(name: str, roles: set[str]) -> str:
    if not roles:
        return f"the down half of {name} is missing"
    for whole in ({"down", "up"}, _HADA, *([_HADA | _HADA_CORES] if roles & _HADA_CORES else []), *_KRON):
        if roles < whole and len(whole - roles) == 1:
            (missing,) = whole - roles
            return f"the {missing}{' half' if missing in ('down', 'up') else ''} of {name} is missing"
    return f"{name} has {', '.join(sorted(roles))}, which are not exactly one whole update"


def _check(fits: bool, expected: str, **shapes: Tensor) -> None:
    if not fits:
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in shapes.items())
        raise ValueError(f"{given}: expected {expected}")


def _widened(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert all tensors to a dtype that holds each of them, at least float32."""
    dtype = torch.float32
    for tensor in given.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return {name: tensor.to(dtype) for name, tensor in given.items()}


def _kernel(tensor: Tensor) -> tuple[int, int] | None:
    """Return (kh, kw) of the weight that a tensor's last axes belong to, or None for a linear layer."""
    return (tensor.shape[2], tensor.shape[3]) if tensor.dim() == 4 else None


def _numbers(*tensors: Tensor) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _low_rank(parts: Mapping[str, Tensor], scale: Scale) -> ModuleUpdate:
    down, up = parts["down"], parts["up"]
    fits = down.dim() in (2, 4) and up.dim() == down.dim() and down.shape[0] == up.shape[1] and down.numel() * up.numel() > 0
    _check(fits and up.shape[2:] in ((), (1, 1)), "(r, q) and (p, r), or (r, q, kh, kw) and (p, r, 1, 1)", down=down, up=up)
    up = up.flatten(1)
    if "mid" not in parts:
        pair = LowRankPair(down.flatten(1), up, scale(len(down)))
        return ModuleUpdate("LoRA", pair.shape, _numbers(down, up), lambda: pair, _kernel(down))
    mid = parts["mid"]
    fits = mid.dim() == 4 and mid.shape[:2] == (len(down), len(down)) and down.shape[2:] == (1, 1) and mid.numel() > 0
    _check(fits, "a core of (r, r, kh, kw) and down of (r, q, 1, 1)", lora_mid=mid, down=down)

    def make() -> LowRankPair:  # on request, because the products of all layers together may be large
        wide = torch.promote_types(down.dtype, torch.float32)
        inner = torch.einsum("abhw,bi->aihw", mid.to(wide), down.flatten(1).to(wide)).flatten(1)
        return LowRankPair(inner, up.to(wide), factor)

    factor, shape = scale(len(down)), (len(up), down.shape[1] * math.prod(mid.shape[2:]))
    return ModuleUpdate("LoRA with a core", shape, _numbers(down, up, mid), make, _kernel(mid))


def _hadamard(parts: Mapping[str, Tensor], scale: Scale) -> ModuleUpdate:
    """scale * (A1 B1) . (A2 B2), cell by cell; with cores, of what each core makes of its factors."""
    given = {name: parts[name] for name in sorted(parts) if name.startswith("hada_")}
    wide = _widened(given)
    a1, b1, a2, b2 = (wide[name] for name in sorted(_HADA))
    _check(all(t.numel() for t in given.values()), "no empty tensor", **given)
    _check(all(t.dim() == 2 for t in (a1, b1, a2, b2)), "matrices", **given)
    factor = scale(len(b1))
    if "hada_t1" in given:
        t1, t2 = wide["hada_t1"], wide["hada_t2"]
        fits = all(t.dim() == 4 and t.shape[:2] == (len(a), len(b)) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
        same = (a1.shape[1:], b1.shape[1:], t1.shape[2:]) == (a2.shape[1:], b2.shape[1:], t2.shape[2:])
        _check(fits and same, "cores of (r, r, kh, kw), factors of (r, p) and (r, q)", **given)
        kernel = _kernel(t1)
        shape = (a1.shape[1], b1.shape[1] * t1.shape[2] * t1.shape[3])
        return ModuleUpdate(
            "LoHa", shape, _numbers(*given.values()), lambda: factor * _rebuilt(t1, a1, b1) * _rebuilt(t2, a2, b2), kernel
        )
    fits = a1.shape[1] == len(b1) and a2.shape[1] == len(b2) and (len(a1), b1.shape[1]) == (len(a2), b2.shape[1])
    _check(fits, "(p, r), (r, q), (p, r), (r, q)", **given)
    return ModuleUpdate("LoHa", (len(a1), b1.shape[1]), _numbers(*given.values()), lambda: factor * (a1 @ b1) * (a2 @ b2))


def _rebuilt(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return (p, q * kh * kw) from a core (r, r, kh, kw) and factors (r, p) and (r, q)."""
    return torch.einsum("ijhw,ip,jq->pqhw", core, a, b).flatten(1)


def _kronecker(parts: Mapping[str, Tensor], scale: Scale) -> ModuleUpdate:
    """scale * kron(W1, W2), each a matrix or a product; without any product there is no rank to determine the scale."""
    given = {name: parts[name] for name in sorted(parts) if name.startswith("lokr_")}
    wide = _widened(given)
    _check(all(t.numel() for t in given.values()), "no empty tensor", **given)
    first, rank = wide.get("lokr_w1"), None
    if first is None:
        a, b = wide["lokr_w1_a"], wide["lokr_w1_b"]
        _check(a.dim() == b.dim() == 2 and a.shape[1] == len(b), "lokr_w1_a of (p, r) and lokr_w1_b of (r, q)", **given)
        rank = len(b)
    size1 = (len(a), b.shape[1]) if first is None else tuple(first.shape)
    size2 = _size_of_second(wide, given)
    if "lokr_w2" not in wide:
        rank = len(wide["lokr_w2_b"])
    _check(len(size1) == 2 and len(size2) in (2, 4), "lokr_w1 a matrix, lokr_w2 of 2 or 4 axes", **given)
    factor = scale(rank)
    shape = (size1[0] * size2[0], size1[1] * math.prod(size2[1:]))

    def make() -> Tensor:  # on request, because the products of all layers together may be large
        w1, w2 = a @ b if first is None else first, _second(wide)
        return factor * torch.kron(w1 if w2.dim() == 2 else w1[:, :, None, None], w2).flatten(1)

    kernel = (size2[2], size2[3]) if len(size2) == 4 else None
    return ModuleUpdate("LoKr", shape, _numbers(*given.values()), make, kernel)


def _size_of_second(wide: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape of the result of `_second`."""
    if "lokr_w2" in wide:
        return tuple(wide["lokr_w2"].shape)
    a, b, core = wide["lokr_w2_a"], wide["lokr_w2_b"], wide.get("lokr_t2")
    if core is None:
        _check(a.dim() == 2 and b.dim() in (2, 4) and a.shape[1] == len(b), "lokr_w2_a of (p, r), lokr_w2_b of (r, q)", **given)
        return (len(a), *b.shape[1:])
    fits = core.dim() == 4 and a.dim() == b.dim() == 2 and core.shape[:2] == (len(a), len(b))
    _check(fits, "lokr_t2 of (r, r, kh, kw), lokr_w2_a of (r, p), lokr_w2_b of (r, q)", **given)
    return (a.shape[1], b.shape[1], *core.shape[2:])


def _second(wide: Mapping[str, Tensor]) -> Tensor:
    if "lokr_w2" in wide:
        return wide["lokr_w2"]
    a, b = wide["lokr_w2_a"], wide["lokr_w2_b"]
    if "lokr_t2" not in wide:
        return (a @ b.flatten(1)).view(len(a), *b.shape[1:])
    return torch.einsum("ijhw,ip,jq->pqhw", wide["lokr_t2"], a, b).contiguous()  # torch.kron needs this memory order


def _difference(diff: Tensor) -> ModuleUpdate:
    _check(diff.dim() in (2, 4) and diff.numel() > 0, "(p, q) or (p, q, kh, kw)", diff=diff)
    flat = diff.flatten(1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return ModuleUpdate("full", (flat.shape[0], flat.shape[1]), diff.numel(), lambda: flat, _kernel(diff))


def _with_magnitude(update: ModuleUpdate, parts: Mapping[str, Tensor]) -> ModuleUpdate:
    """Add DoRA's norms: peft has those of rows, LyCORIS also those of input channels, and their shapes tell which."""
    given = [name for name in ("magnitude", "dora_scale") if name in parts]
    if not given:
        return update
    norms, columns = parts[given[0]], update.shape[1]
    rows, channels = update.shape[0], columns // math.prod(update.kernel or (1,))
    of_rows = norms.numel() == rows and (given[0] == "magnitude" or norms.dim() < 2 or norms.shape[0] == rows)
    # A convolution's LoHa or LoKr may be flat; then only the norms show that it is a convolution.
    fits = norms.numel() == channels or (
        update.kernel is None and norms.dim() == 4 and columns % max(norms.numel(), 1) == 0 < norms.numel()
    )
    of_columns = given[0] == "dora_scale" and norms.dim() > 1 and norms.shape[1] == norms.numel() and fits
    if len(given) > 1 or not (of_rows or of_columns):
        raise ValueError(f"{given[0]} {tuple(norms.shape)}: expected the norms of {rows} rows or of {channels} input channels")
    wide = norms.flatten().to(torch.promote_types(norms.dtype, torch.float32))
    trained = update.trained + norms.numel()
    return ModuleUpdate(f"{update.kind} with DoRA", update.shape, trained, update.make, update.kernel, Magnitude(wide, of_rows))
