"""A `ConfigDict` laid out from the typed options, and read back into them. Nothing below this package sees a `ConfigDict`.

A method's own options are `config.unlearn.METHOD.FIELD`. A shared field of `config.unlearn` can be set there too, for that method
alone: the more specific field wins.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict

from retrack_jax.checks import UserError
from retrack_jax.config.options import Options
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.unlearn.options import MethodOptions


def default_config() -> ConfigDict:
    """Returns every field with its default, those that are None as typed placeholders.

    `config.unlearn.METHOD` holds a method's own options, and a placeholder for every shared field, which overrides it.
    """
    config = _laid_out(Options, leave_out=("methods",))
    shared = [one for one in fields(UnlearnOptions) if not dataclasses.is_dataclass(one.type)]
    for name, method in METHODS.items():
        if not method.from_scratch:
            own = _laid_out(method.options)
            for one in shared:
                own[one.name] = config_dict.placeholder(_plain_type(one.type))
            config.unlearn[name] = own
    return config


def read_config(config: ConfigDict) -> Options:
    """Returns the typed options that `config` describes.

    Raises:
      UserError: a value that no run can use; the message starts with the field, as `config.data.copies`.
    """
    values = _plain(config)
    unlearn = values.pop("unlearn")
    shared = {name: value for name, value in unlearn.items() if name not in METHODS}
    methods = {name: unlearn_options(name, shared, unlearn[name], "config.unlearn.") for name in METHODS if name in unlearn}
    return _make(Options, {**values, "unlearn": shared, "methods": methods}, "config.")


def unlearn_options(method: str, shared: Mapping, own: Mapping, where: str) -> UnlearnOptions:
    """Returns the options of one method: the shared fields, those that `own` sets for it, and its own.

    Args:
      method: a key of `METHODS`.
      shared: fields of `UnlearnOptions`; those left out take their defaults.
      own: fields of either record. None leaves a shared one as it is.
      where: goes before a field's name in a message.
    """
    kind = METHODS[method].options
    names = {one.name for one in fields(kind)}
    overrides = {name: value for name, value in own.items() if name not in names and value is not None}
    mine = _make(kind, {name: value for name, value in own.items() if name in names}, f"{where}{method}." if where else "")
    return _make(UnlearnOptions, {**shared, **overrides, "own": mine}, where)


def _make(kind: type, values: Mapping, where: str):
    """Returns a `kind` with the fields `values`; a mapping for a field that is itself a record becomes that record."""
    nested = {one.name: one.type for one in fields(kind) if hasattr(values.get(one.name), "keys")}
    made = {name: _make(of, values[name], f"{where}{name}.") for name, of in nested.items() if dataclasses.is_dataclass(of)}
    try:
        return kind(**{**values, **made})
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def _laid_out(kind: type, leave_out: tuple[str, ...] = ()) -> ConfigDict:
    config = ConfigDict()
    for one in fields(kind):
        if one.name in leave_out or one.type is MethodOptions:
            continue
        if dataclasses.is_dataclass(one.type):
            config[one.name] = _laid_out(one.type)
        else:
            config[one.name] = config_dict.placeholder(_plain_type(one.type)) if one.default is None else one.default
    return config


def _plain_type(kind: Any) -> type:
    """Returns the type of a field's values, without None."""
    if typing.get_origin(kind) is types.UnionType:
        return next(one for one in typing.get_args(kind) if one is not types.NoneType)
    return kind


def _plain(config: ConfigDict) -> dict:
    return {name: _plain(value) if isinstance(value, ConfigDict) else _python(value) for name, value in config.items()}


def _python(value: Any) -> Any:
    """Returns NumPy's numbers, also those in a tuple or list, as Python's, which JSON knows."""
    if isinstance(value, (tuple, list)):
        return type(value)(_python(one) for one in value)
    return value.item() if isinstance(value, np.generic) else value
