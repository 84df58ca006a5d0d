"""From diffusers' `config.json` to the fields of a module and back, for all networks."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from retrack_jax.checks import UserError, check, check_choice, suggestion

# Fields of our modules that diffusers' config does not have.
_OWN_FIELDS = ("parent", "name", "dtype", "remat")
# What diffusers' EMAModel adds to the config of the network that it averages.
_EMA_KEYS = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power", "foreach"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigFormat:
    """How the config of one class of diffusers is read.

    Attributes:
      class_name: the name of the class in diffusers.
      fixed: options that are supported at one value only.
      passed_over: keys that do not change what the network computes here.
    """

    class_name: str
    fixed: Mapping[str, Any]
    passed_over: tuple[str, ...] = ()

    def read(self, module_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields that `config` sets, lists as tuples. Ignores keys with a leading underscore or of an averaged model.

        Raises:
          UserError: the config is another class's, or has an unknown key, or an option that is not supported.
        """
        name, ours = config.get("_class_name", self.class_name), module_class.__name__
        check(name == self.class_name, f"the config is of a {name}; only {self.class_name} is read here")
        known, values = set(_config_fields(module_class)), {}
        for key, value in config.items():
            if key.startswith("_") or key in self.passed_over + _EMA_KEYS:
                continue
            if key in self.fixed:
                only = json.dumps(self.fixed[key])
                check(value == self.fixed[key], f"the {self.class_name} config's {key} is {value!r}; only {only} is supported")
            elif key in known:
                values[key] = tuple(value) if isinstance(value, list) else value
            else:
                hint = suggestion(key, known)
                raise UserError(f"the {self.class_name} config has an option {key!r} that {ours} does not know{hint}")
        return values

    def write(self, module) -> dict[str, Any]:
        """Returns the `config.json` of `module`, every option spelled out."""
        values = {name: getattr(module, name) for name in _config_fields(type(module))}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, (tuple, list))}
        return {"_class_name": self.class_name} | values | lists | self.fixed


class Configured:
    """A Linen module that diffusers has too: subclasses set `config_format` and define `check_options()`."""

    config_format: ClassVar[ConfigFormat]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **own_fields) -> Self:
        """Returns the module for diffusers' `config.json` as a dict; `own_fields` sets `dtype` and `remat`.

        Raises:
          UserError: the config is another class's, or has an unknown key, or an option that is not supported.
        """
        module = cls(**cls.config_format.read(cls, config), **own_fields)
        module.check_options()
        return module

    def to_config(self) -> dict[str, Any]:
        """Returns diffusers' `config.json` of this network, every option spelled out."""
        return self.config_format.write(self)


def check_block_types(module, *, plain=str, **kinds) -> None:
    """Raises `UserError` unless each field that `kinds` names has one entry per block, and each entry is one of its kinds.

    Also checks the widths of the blocks and that the groups of the norms divide them. `plain` maps an entry to the name that is
    compared.
    """
    widths, groups, owner = module.block_out_channels, module.norm_num_groups, type(module).__name__
    whole = isinstance(widths, (tuple, list)) and all(isinstance(width, int) and width > 0 for width in widths)
    check(whole, f"block_out_channels is {widths!r}; it must be a list of whole numbers above 0")
    for field, allowed in kinds.items():
        types = getattr(module, field)
        whole = len(types) == len(widths)
        check(whole, f"{field} has {len(types)} entries, block_out_channels {len(widths)}; they must be as many")
        for entry in types:
            check_choice(f"an entry of {field}", plain(entry), allowed)
    for width in widths:
        whole = isinstance(groups, int) and groups > 0 and width % groups == 0
        check(whole, f"{owner}'s norm_num_groups is {groups!r}; it must divide {width} channels")


def _config_fields(module_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(module_class) if field.name not in _OWN_FIELDS]
