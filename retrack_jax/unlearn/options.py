"""Each method's options: one record a method, one default an option.

`config.unlearn.METHOD.NAME` sets an option, and so does the keyword `NAME` of `api.unlearn`. Every message starts with the
option's name, so that whoever makes a record can put before it where the user set it.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import jax.numpy as jnp

from retrack_jax.checks import check, check_choice, check_number
from retrack_jax.notation import Array

SHAPES = ("constant", "linear", "cosine")
WHOLE_CLASS = ("null", "nearest")


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The options of a method that has none.

    Attributes:
      scheduled: the option, if any, that goes over the run to the value of `NAME_end` in the shape of `NAME_schedule`.
    """

    scheduled: ClassVar[str] = ""

    def at(self, step: Array, num_steps: int) -> Self:
        """Returns the options at `step`, an int32 scalar in [0, num_steps): an option that follows a schedule becomes traced."""
        name = self.scheduled
        if not name or getattr(self, f"{name}_schedule") == "constant":
            return self
        changed = copy.copy(self)
        start, end, shape = (getattr(self, field) for field in (name, f"{name}_end", f"{name}_schedule"))
        object.__setattr__(changed, name, _between(start, end, shape, step, num_steps))  # traced, so it cannot be checked
        return changed

    def only_for(self, condition: str) -> list[str]:
        """Returns the options that are set and that only networks with `condition` ("captions", "labels", ...) read."""
        return []


@dataclass(frozen=True, kw_only=True)
class RetrackOptions(MethodOptions):
    """ReTrack: lambda L_unlearn + (1 - lambda) L_R. For captions or labels: unlearn/losses.py, equations 9 and 10."""

    scheduled: ClassVar[str] = "lam"
    lam: float | None = 0.005  # lambda, in [0, 1]: the weight of the unlearning term; None: left to the rules (config/rules.py)
    lam_schedule: str = "constant"  # or linear, cosine: from lam to lam_end over the run
    lam_end: float | None = None
    snr_cap: float | None = None  # c: the unlearning term at t is weighted by min(1, c sigma^2/gamma^2); None: the paper's loss
    beta: float = 0.0  # of p_k ~ exp(-||v_k||^2/2 + beta sim(c_f, c_k)), which also ranks neighbors; 0: the paper's loss
    same_caption: bool = False  # neighbors are images with an equal caption alone, as in the paper's Stable Diffusion recipe
    anchor: float | None = None  # if no neighbor's caption is at least this similar: the pretrained prediction; None: never
    whole_class: str = ""  # if no image of a label remains: null (the null label's prediction) or nearest (images of any label)

    def __post_init__(self):
        if self.snr_cap is not None:
            check_number("snr_cap", self.snr_cap, 0.0, above=True)
        check_number("beta", self.beta, 0.0)
        if self.anchor is not None:
            check_number("anchor", self.anchor, -1.0, 1.0)
        if self.whole_class:
            check_choice("whole_class", self.whole_class, WHOLE_CLASS)
        if self.lam is not None:
            check_number("lam", self.lam, 0.0, 1.0)
        _check_schedule("lam", self.lam_schedule, self.lam_end)

    def only_for(self, condition: str) -> list[str]:
        names = {"captions": ("beta", "same_caption", "anchor"), "labels": ("whole_class",)}.get(condition, ())
        defaults = RetrackOptions()
        return [name for name in names if getattr(self, name) != getattr(defaults, name)]


@dataclass(frozen=True, kw_only=True)
class SissNoIsOptions(MethodOptions):
    """SISS without importance sampling: g_main - (s/||g_corr||) g_corr."""

    scale: float = 0.0  # s; 0: `share` of the main gradient's norm
    share: float = 0.1

    def __post_init__(self):
        check_number("scale", self.scale, 0.0)
        check_number("share", self.share, 0.0)
        unread = self.scale > 0 and self.share != SissNoIsOptions.share
        check(
            not unread, f"share is {self.share!r}, which is not read while scale is above 0; set scale to 0, or leave share out"
        )


@dataclass(frozen=True, kw_only=True)
class SissOptions(SissNoIsOptions):
    """SISS: points are noised from forgotten images with probability `mixture`, else from remaining ones."""

    scheduled: ClassVar[str] = "mixture"
    mixture: float = 0.5  # lambda of the SISS paper, in [0, 1]
    mixture_schedule: str = "constant"  # or linear, cosine: from mixture to mixture_end over the run
    mixture_end: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("mixture", self.mixture, 0.0, 1.0)
        _check_schedule("mixture", self.mixture_schedule, self.mixture_end)


@dataclass(frozen=True, kw_only=True)
class EraseDiffOptions(MethodOptions):
    """EraseDiff: g_R + max(eta - <g_R, g_c>/||g_c||^2, 0) g_c."""

    eta: float = 1e-3

    def __post_init__(self):
        check_number("eta", self.eta, 0.0)


def _check_schedule(name: str, shape: str, end: float | None) -> None:
    check_choice(f"{name}_schedule", shape, SHAPES)
    if shape == "constant":
        check(
            end is None,
            f"{name}_end is {end!r}, and {name} stays as it is; set {name}_schedule to linear or cosine, or leave it out",
        )
    else:
        check(end is not None, f"{name}_end is not set; {name}_schedule goes from {name} to {name}_end")
        check_number(f"{name}_end", end, 0.0, 1.0)


def _between(start: float, end: float, shape: str, step: Array, num_steps: int) -> Array:
    """Returns the value at `step` on a line, or half a cosine, from `start` to `end`."""
    progress = jnp.clip(step.astype(jnp.float32) / max(num_steps - 1, 1), 0.0, 1.0)
    if shape == "cosine":
        progress = 0.5 - 0.5 * jnp.cos(jnp.pi * progress)
    return start + (end - start) * progress
