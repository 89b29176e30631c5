"""Find the parameters of classifier heads, and warn about those that an adapter freezes."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import nn

from loca_vision.model.traversal import own_parameters

_LOG = logging.getLogger(__name__)
_NAMES = {"head", "heads", "classifier", "fc", "score", "cls_head", "head_dist", "classification_head", "fc_out", "output_head"}


# The heads of transformers' image classifiers, including those of a distilled model.
_OF_TRANSFORMERS = ("classifier", "cls_classifier", "distillation_classifier", "classifier_distill", "score")


def classifier(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the classifier heads of all timm models and transformers' image classifiers in `model`.

    timm's `get_classifier` does not return the second head of VOLO, which is named in the model's configuration.
    """
    found: dict[int, nn.Parameter] = {}
    for owner in model.modules():
        heads = _heads_of(owner) if hasattr(owner, "get_classifier") else []
        if _classifies_images(type(owner)):
            heads = [head for name in _OF_TRANSFORMERS if (head := owner._modules.get(name)) is not None]
        found |= {id(parameter): parameter for head in heads for parameter in head.parameters()}
    return list(found.values())


def _classifies_images(cls: type) -> bool:
    return any("ForImageClassification" in one.__name__ and one.__module__.startswith("transformers.") for one in cls.__mro__)


def _heads_of(owner: Any) -> list[nn.Module]:
    head, named = owner.get_classifier(), (getattr(owner, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = [*(head if isinstance(head, (tuple, list)) else [head])]
    for name in (named,) if isinstance(named, str) else named:
        heads += [module for path, module in owner.named_modules() if path == name]
    return [module for module in heads if isinstance(module, nn.Module)]


def head_of(name: str) -> str | None:
    """Return the path of the head that a parameter belongs to, judging by its name.

    Return None inside numbered blocks and for other names.
    """
    path: list[str] = []
    for part in name.split(".")[:-1]:
        if part.isdigit():
            return None
        path.append(part)
        if part in _NAMES:
            return ".".join(path)
    return None


def say_what_freezes(model: nn.Module, kept: Collection[str]) -> None:
    """Log which parts of a model an adapter is about to freeze that the user may expect to be trained.

    These are parts named like a head, and whatever is trainable if the user has frozen the rest.

    Args:
        model: the model that gets the adapter.
        kept: the names of parameters that the adapter trains as a whole.
    """
    own, head = own_parameters(model), {id(parameter) for parameter in classifier(model)}
    could_train = [p for p in own.values() if type(p) is nn.Parameter and p.is_floating_point()]
    chosen = not all(p.requires_grad for p in could_train)  # quantised parameters are frozen in any case
    frozen = [name for name, p in own.items() if p.requires_grad and name not in kept and id(p) not in head]
    knows = _classifies_images(type(model))  # other parts named like a head, such as Siglip's pooling, are no heads
    parts = [(None if knows else head_of(name)) or (name.rpartition(".")[0] or name if chosen else None) for name in frozen]
    named = list(dict.fromkeys(part for part in parts if part))
    if named:
        shown = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
        _LOG.warning("%s: frozen, as all but the adapter; to train it, pass modules_to_save=%r", shown, tuple(named[:4]))
