"""From diffusers' `config.json` to the fields of a module and back, for all networks."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from retrack_jax.checks import UserError, check, check_choice, suggestion

# Fields of our modules that diffusers' config does not have.
_OWN_FIELDS = ("parent", "name", "dtype", "remat")


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
        """Returns the fields that `config` sets, lists as tuples; keys that start with an underscore are ignored.

        Raises:
          UserError: the config is another class's, or has an unknown key, or an option that is not supported.
        """
        name, ours = config.get("_class_name", self.class_name), module_class.__name__
        check(name == self.class_name, f"the config is of a {name}; only {self.class_name} is read here")
        known, values = set(_config_fields(module_class)), {}
        for key, value in config.items():
            if key.startswith("_") or key in self.passed_over:
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


def check_block_types(module, *, plain=str, **kinds) -> None:
    """Raises `UserError` unless each field that `kinds` names has one entry per block, and each entry is one of its kinds.

    `plain` maps an entry to the name that is compared.
    """
    widths = module.block_out_channels
    whole = isinstance(widths, (tuple, list)) and all(isinstance(width, int) and width > 0 for width in widths)
    check(whole, f"block_out_channels is {widths!r}; it must be a list of whole numbers above 0")
    blocks = len(widths)
    for field, allowed in kinds.items():
        types = getattr(module, field)
        check(len(types) == blocks, f"{field} has {len(types)} entries, block_out_channels {blocks}; they must be as many")
        for entry in types:
            check_choice(f"an entry of {field}", plain(entry), allowed)


def _config_fields(module_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(module_class) if field.name not in _OWN_FIELDS]
