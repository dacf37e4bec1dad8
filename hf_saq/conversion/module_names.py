"""Match names and patterns of a configuration with the modules of a model, with or without its base model's prefix."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn


class ModuleNames:
    """Knows by which names a configuration may call the modules of a model.

    What a classifier of transformers calls `vit.layers.0` is `layers.0` in the base model alone. One configuration
    serves both, so a pattern counts if it matches either name; which of the two models is at hand makes no difference.

    Args:
        only_where_needed: Whether a pattern that matches the names of the model at hand is not tried on the others, as
            in version 1 of the format.
    """

    def __init__(self, model: nn.Module, only_where_needed: bool = False):
        self._prefix, self._is_base = "", False
        prefix = getattr(model, "base_model_prefix", "")
        if isinstance(prefix, str) and prefix:
            self._prefix, self._is_base = f"{prefix}.", not isinstance(getattr(model, prefix, None), nn.Module)
        self._own = [name for name, _ in model.named_modules() if name]
        self._only_where_needed = only_where_needed

    def add(self, names: Iterable[str]) -> None:
        """Take in names of modules that the model is going to have."""
        self._own += names

    def matches(self, pattern: str, name: str) -> bool:
        """Say whether `pattern` (a name, the dotted beginning of one, or a glob) means the module called `name`."""
        if _matches(pattern, name):
            return True
        if self._only_where_needed and any(_matches(pattern, own) for own in self._own):
            return False
        other = self._other(name)
        return other is not None and _matches(pattern, other)

    def are_the_same(self, entry: str, name: str) -> bool:
        """Say whether `entry` is the name of the module called `name`, here or in the model with or without a head."""
        return entry in (name, self._other(name))

    def has(self, entry: str) -> bool:
        """Say whether a module is called `entry`."""
        return any(self.are_the_same(entry, name) for name in self._own)

    def any_matches(self, patterns: Iterable[str], *names: str) -> bool:
        return any(self.matches(pattern, name) for pattern in patterns for name in names)

    def check(
        self, where: str, patterns: Collection[str], layers: Collection[str] | None = None, are_needed: bool = False
    ) -> None:
        """Raise `ValueError` for a pattern that means no module, or modules alone and not the layers inside of them.

        Args:
            where: Name of the setting, for messages.
            layers: Names of those modules that the setting is about.
            are_needed: Whether a pattern has to mean one of them: it would have no effect otherwise.
        """
        for pattern in patterns:
            meant = [name for name in self._own if self.matches(pattern, name)]
            if not meant:
                raise ValueError(
                    f"{where}: {pattern!r} matches no module of the model. Expected a dotted module name, a prefix of "
                    f"one, or a glob such as '*.layers.0.*'; the model has for example {self._own[:3]}."
                )
            if layers is None or any(self.matches(pattern, name) for name in layers):
                continue
            inside = next((name for name in layers if any(name.startswith(f"{module}.") for module in meant)), None)
            if inside is not None:
                raise ValueError(
                    f"{where}: {pattern!r} matches {meant[0]}, and none of the layers inside, such as {inside}: a "
                    f"glob has to match a whole name. Expected {pattern + '.*'!r} for all that is inside."
                )
            if are_needed:
                raise ValueError(
                    f"{where}: {pattern!r} matches {meant[0]}, which is no layer that can be quantized, so that it "
                    f"would have no effect; expected layers such as {list(layers)[:3]}."
                )

    def check_stored(self, where: str, patterns: Collection[str]) -> None:
        """Raise `ValueError` if none of the patterns means a module: single ones may mean what this model leaves out,
        as a base model does with the head."""
        if patterns and not any(self.any_matches(patterns, name) for name in self._own):
            raise ValueError(
                f"quantization_config.{where}: none of {list(patterns)} is a module of the model, which has for "
                f"example {self._own[:3]}. The configuration is that of another model."
            )

    def _other(self, name: str) -> str | None:
        if not self._prefix:
            return None
        if self._is_base:
            return self._prefix + name
        return name.removeprefix(self._prefix) if name.startswith(self._prefix) else None


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
