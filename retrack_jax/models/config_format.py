"""From diffusers' `config.json` to the fields of a module and back, for all networks."""

import dataclasses
import json
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from retrack_jax.checks import UserError, check, check_choice, suggestion

# What a config may ask for: layers are laid out, which takes time, before the weights are found not to have them.
LARGEST = 1 << 20  # channels, tokens, timesteps
MOST_LAYERS = 128
_MOST_BLOCKS = 10  # images must be multiples of 2^9
_RANGES = {
    "downsample_padding": (0, 1), "freq_shift": (0, 1), "layers_per_block": (1, 10), "transformer_layers_per_block": (1, 10),
    "reverse_transformer_layers_per_block": (1, 10),
    "mid_block_scale_factor": (1e-6, 1e6), "num_layers": (1, MOST_LAYERS),
    "shift_factor": (-1e6, 1e6), "latents_mean": (-1e6, 1e6), "latents_std": (1e-6, 1e6),
}  # fmt: skip

# Fields of our modules that diffusers' config does not have.
_OWN_FIELDS = ("parent", "name", "dtype", "remat")
# What diffusers' EMAModel adds to the config of the network that it averages.
_EMA_KEYS = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power", "foreach"
)  # fmt: skip


class Configured:
    """A Linen module that diffusers has too, whose fields are the options of diffusers' class.

    Attributes:
      class_name: the name of the class in diffusers.
      fixed: options that are supported at one value only.
      passed_over: keys that do not change what the network computes here.
    """

    class_name: ClassVar[str]
    fixed: ClassVar[Mapping[str, Any]] = {}
    passed_over: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **own_fields) -> Self:
        """Returns the module for diffusers' `config.json` as a dict; `own_fields` sets `dtype` and `remat`.

        Lists become tuples. Keys with a leading underscore, or of an averaged model, are ignored.

        Raises:
          UserError: the config is another class's, or has an unknown key, an option that is not supported, or a value of another
            kind or range than the field has.
        """
        name, called = config.get("_class_name", cls.class_name), f"the {cls.class_name} config"
        check(name == cls.class_name, f"the config is of a {name}; only {cls.class_name} is read here")
        known, values = _config_fields(cls), {}
        for key, value in config.items():
            if key.startswith("_") or key in cls.passed_over + _EMA_KEYS:
                continue
            if key in cls.fixed:
                only = json.dumps(cls.fixed[key])
                check(value == cls.fixed[key], f"{called}'s {key} is {value!r}; only {only} is supported")
            elif key in known:
                kind = known[key], *_RANGES.get(key, (1, LARGEST))
                check(_fits(value, *kind), f"{called}'s {key} is {value!r:.200}; it must be {_expected(*kind)}")
                values[key] = tuple(value) if isinstance(value, list) else value
            else:
                raise UserError(f"{called} has an option {key!r} that {cls.__name__} does not know{suggestion(key, known)}")
        module = cls(**values, **own_fields)
        module.check_options()
        return module

    def check_options(self) -> None:
        """Raises `UserError` for options that do not fit together."""

    def to_config(self) -> dict[str, Any]:
        """Returns diffusers' `config.json` of this network, every option spelled out."""
        values = {name: getattr(self, name) for name in _config_fields(type(self))}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, (tuple, list))}
        return {"_class_name": self.class_name} | values | lists | dict(self.fixed)


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


def _config_fields(module_class: type) -> dict[str, Any]:
    """Returns name -> type of the fields that a config may set."""
    return {field.name: field.type for field in dataclasses.fields(module_class) if field.name not in _OWN_FIELDS}


def _fits(value: Any, kind: Any, least: int, most: int) -> bool:
    """Whether a JSON value is of a field's type, its whole numbers in [least, most]; 1 is the least of whole numbers alone."""
    if kind is Any:  # a size or sizes
        kind = int | tuple[int, ...] | None
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one, least, most) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        entry, whole = typing.get_args(kind)[0], isinstance(value, (list, tuple)) and 0 < len(value) <= _MOST_BLOCKS
        return whole and all(_fits(one, entry, least, most) for one in value)
    if kind in (int, float):
        number = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        return number and (0 if kind is float and least == 1 else least) <= value <= most
    return isinstance(value, kind)


def _expected(kind: Any, least: int, most: int) -> str:
    """Says in words what `_fits` accepts."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_expected(one, least, most) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of 1 to {_MOST_BLOCKS}, each {_expected(typing.get_args(kind)[0], least, most)}"
    lowest = 0 if kind is float and least == 1 else least
    words = {int: f"a whole number from {least} to {most}", float: f"a number from {lowest} to {most}", bool: "true or false"}
    return words.get(kind, "a name" if kind is str else "null" if kind is types.NoneType else "whole numbers")
