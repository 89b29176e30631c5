"""A trainer's settings of methods, read from the registered config classes: which belong to which method, defaults, help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

import tyro

from loca_vision.messages import nearest
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.by_name import COMMON, setting_fields
from loca_vision.methods.registry import KINDS, config_class, method_names, unknown_method
from loca_vision.recipes.settings.yaml_value import value_of_text

Assignments = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="NAME=VALUE")]
"""The type of the field `set`: fields of the method that the trainer has no flag for."""


@dataclass(frozen=True)
class MethodSettings:
    """Which settings of a trainer belong to which method.

    Args:
        flags: the trainer's setting for each field of a config class, by the field's name.
        adapters: settings of every method with an adapter.
        schedule: settings of methods whose locations move.
        others: methods without an adapter and their settings, by name.
        task: takes a config class and the values that the user chose, by field, and returns the trainer's own defaults, which
            override the class's.
    """

    flags: Mapping[str, str]
    adapters: frozenset[str] = frozenset({"set"})
    schedule: frozenset[str] = frozenset()
    others: Mapping[str, frozenset[str]] = field(default_factory=dict)
    task: Callable[[type[AdapterConfig], Mapping[str, Any]], Mapping[str, Any]] = lambda config, chosen: {}

    def known(self) -> tuple[str, ...]:
        """The registered methods, and the others."""
        return (*KINDS, *self.others)

    def of(self, method: str) -> frozenset[str]:
        """Return the settings of a method.

        Raises:
            ValueError: there is no such method.
        """
        if method in self.others:
            return self.others[method]
        config = self.config_class(method)
        own = {self.flags[name] for name in setting_fields(config) if name in self.flags}
        return self.adapters | own | (self.schedule if config.moves_locations else frozenset())

    def config_class(self, method: str) -> type[AdapterConfig]:
        """Return the registry's config class; errors also name the methods without an adapter."""
        if method not in (*method_names(), *self.others):
            raise unknown_method(method, (*method_names(), *self.others))
        return config_class(method)

    def adapter(self, method: str) -> type[AdapterConfig] | None:
        """Return the config class; None for a method without an adapter."""
        return None if method in self.others else self.config_class(method)

    def moves_locations(self, method: str) -> bool:
        """Return whether locations move, so that not everything that is trained has a gradient at every step."""
        config = self.adapter(method)
        return config is not None and config.moves_locations

    def check(self, method: str, given: Collection[str]) -> None:
        """Raise ValueError if a setting is given that belongs to another method."""
        own = self.of(method)
        every = {name: self.of(name) for name in self.known()}
        for name in sorted(frozenset().union(*every.values()) - own):
            if name in given:
                having = ", ".join(other for other, of in every.items() if name in of)
                raise ValueError(f"--{name} is a setting of {having}; the method is {method}")

    def defaults(self, method: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the trainer's settings of a method at their defaults; some depend on `chosen`, the values by field."""
        config = self.adapter(method)
        if config is None:
            return {}
        task = self.task(config, chosen)
        values = {name: task.get(name, own.default) for name, own in setting_fields(config).items() if name in self.flags}
        return {self.flags[name]: value for name, value in values.items() if value is not dataclasses.MISSING}

    def chosen(self, method: str, recipe: Any) -> dict[str, Any]:
        """Return the trainer's settings under the names of the method's fields, without those that are None."""
        config = self.adapter(method)
        names = [] if config is None else [name for name in setting_fields(config) if name in self.flags]
        values = {name: getattr(recipe, self.flags[name]) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def config(self, recipe: Any, seed: int) -> AdapterConfig | None:
        """Return the config to inject, from a recipe with the fields `method`, `targets`, `layers` and `set`; None without one.

        Raises:
            ValueError: a setting is out of its range, or the method does not have it.
        """
        config = self.adapter(recipe.method)
        if config is None:
            return None
        values = self.chosen(recipe.method, recipe) | self._assigned(config, recipe.set)
        values |= {"targets": recipe.targets, "seed": seed} | ({"layers": recipe.layers} if recipe.layers else {})
        if recipe.layers and "layers" not in {field.name for field in dataclasses.fields(config)}:  # type: ignore[arg-type]
            raise ValueError(f"--layers: the method {recipe.method} goes on all layers: its settings have no field `layers`")
        for name, own in setting_fields(config).items():
            if name not in values and own.default is own.default_factory is dataclasses.MISSING:
                raise ValueError(f"--set {name}=VALUE is missing, which the method {recipe.method} needs")
        return config(**values)

    def _assigned(self, config: type[AdapterConfig], assignments: Sequence[str]) -> dict[str, Any]:
        """Return the values of `--set`, converted to the types of their fields."""
        fields = {name: own for name, own in setting_fields(config).items() if name not in self.flags}
        values = {}
        for name, text in assigned(assignments).items():
            if name in (*self.flags, *COMMON):
                raise ValueError(f"--set {name}={text}: say --{self.flags.get(name, name)} instead")
            if name not in fields:
                raise ValueError(
                    f"--set {name}={text}: the method {config.method} has no such field{nearest(name, fields)}; "
                    f"there are {', '.join(fields) or 'none without a flag'}"
                )
            try:
                values[name] = value_of_text(text, get_type_hints(config)[name])
            except ValueError as error:
                raise ValueError(f"--set {name}={text}: {error}") from None
        return values

    # Help

    def help(self, setting: str) -> Any:
        """Return an annotation for a setting: `--help` names the methods that have it, and their defaults; plug-ins' too."""

        def hint(default: str) -> str:
            having = [method for method in self.known() if setting in self.of(method)]
            if default != "None":
                return f"(default: {default}; {', '.join(having)})"
            by_default: dict[str, list[str]] = {}
            for method in having:
                by_default.setdefault(str(self.defaults(method, {}).get(setting)), []).append(method)
            said = "; ".join(f"{value} of {', '.join(methods)}" for value, methods in by_default.items())
            return f"(default: {said})"

        return tyro.conf.arg(help_behavior_hint=hint)

    def help_of_method(self) -> Any:
        """Return an annotation for `method`: `--help` lists the methods."""

        def hint(default: str) -> str:
            said = [f"{name} ({config.summary})" if config.summary else name for name, config in KINDS.items()]
            return f"(default: {default}; {', '.join([*said, *self.others])})"

        return tyro.conf.arg(metavar="METHOD", help_behavior_hint=hint)


def assigned(assignments: Sequence[str]) -> dict[str, str]:
    """Parse texts NAME=VALUE into values by name; of duplicates the last counts.

    Raises:
        ValueError: a text has no equals sign.
    """
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (equals and name and text):
            raise ValueError(f"--set {assignment}: expected NAME=VALUE, as in --set terms=4")
        values[name.replace("-", "_")] = text
    return values


def as_assignments(values: Mapping[str, str]) -> tuple[str, ...]:
    """Return the texts from which `assigned` reads the same values."""
    return tuple(f"{name}={text}" for name, text in values.items())
