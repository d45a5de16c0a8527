"""Names of modules in adapters: as they are here, for those that another class or version of transformers wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from transformers import PreTrainedModel

from recipes.models.adapters import PREFIX, plain_name, split_key


class ModuleNames:
    """Which module of this model an adapter's name means.

    First transformers' own rules (they turn names in checkpoints into names of modules), then the name without the
    wrappers around the layers, where it means one module alone: an adapter that was trained on the text decoder of a
    vision-language model fits the whole model, and the other way round.

    Args:
        model: May be empty.
        also: Names of further modules, as its checkpoint has them.

    Attributes:
        known: Every module of the model.
    """

    def __init__(self, model: PreTrainedModel, *, also: Iterable[str] = ()) -> None:
        # Of transformers 5: the environment autogptq has 4, imports this room, and loads no adapter.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self.known = frozenset(name for name, _ in model.named_modules() if name) | frozenset(also)
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._weights = dict.fromkeys((f"{name}.weight" for name in self.known), True)
        self._prefix = model.base_model_prefix
        self._plain = _one_name_each(self.known)

    def here(self, module: str) -> str:
        """The module's name in this model; as it is where there is no such module."""
        if module in self.known:
            return module
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(f"{module}.weight", self._renamings, [], self._prefix, self._weights)
        renamed = renamed.removesuffix(".weight")
        return renamed if renamed in self.known else self._plain.get(plain_name(module), module)

    def key(self, key: str) -> str:
        """The name of an adapter's tensor with its module's name in this model."""
        module, tail = split_key(key)
        return f"{PREFIX}{self.here(module)}.{tail}" if key.startswith(PREFIX) and module else key


def _one_name_each(names: Iterable[str]) -> dict[str, str]:
    """Names by what is left without wrappers, but for those that are left the same."""
    by_plain: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_plain[plain_name(name)].append(name)
    return {plain: alike[0] for plain, alike in by_plain.items() if len(alike) == 1}
