"""Low-rank adapters (LoRA): small matrices that are trained in place of the kernels of some layers.

    (1)  W' = W + (alpha / r) A B        W [in, out] or [kh, kw, in, out], A like W with r outputs, B [r, out] or [1, 1, r, out]

A is drawn from a normal distribution of standard deviation 1/r and B is 0, as peft and diffusers' script for text to image do, so
that training starts at W. An adapter is a tree with `lora_A` and `lora_B` below each layer that it changes, and nothing else; its
names and layouts in a file follow the same rules as those of a network (weights/names.py).

The merged W' is made inside the step, so methods see a network like any other. It lives as long as the step needs W'.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import traverse_util

from retrack_jax.checks import check, check_choice, check_int, check_number
from retrack_jax.notation import PyTree, Rng
from retrack_jax.weights.names import DIFFUSERS

LORA, EVERY_WEIGHT = ADAPTERS = ("lora", "none")
MERGED, ADAPTER = EXPORTS = ("merged", "adapter")
# The layers that are adapted if none are named, of which a network may have some; the second line is Stable Diffusion 3's.
_OF_ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
_INIT = 2**32 - 1  # what a run's key is folded with to draw A; steps count from 0


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """`config.unlearn.lora`: the adapter, if `config.unlearn.adapter` is lora."""

    rank: int = 4  # r, the columns of A and the rows of B
    alpha: float | None = None  # the change is scaled by alpha / rank; None: alpha = rank
    layers: tuple | None = None  # ends of diffusers' names of dense layers and convolutions; None: the layers of attention
    export: str = "merged"  # what a run leaves: the whole network, or the adapter alone (Stable Diffusion)

    def __post_init__(self):
        check_int("rank", self.rank)
        if self.alpha is not None:
            check_number("alpha", self.alpha, 0.0, above=True)
        if self.layers is not None:
            names = not isinstance(self.layers, str) and len(self.layers) > 0 and all(isinstance(one, str) for one in self.layers)
            check(names, f"layers is {self.layers!r}; give names such as ('to_q', 'to_v')")
            object.__setattr__(self, "layers", tuple(self.layers))  # a list has no hash, and the compiled steps are kept by it
        check_choice("export", self.export, EXPORTS)

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def adapted(lora: LoraOptions, params: PyTree, where: str = "lora.") -> dict[str, tuple[str, ...]]:
    """Returns the layers of `params` (arrays or shapes) that `lora` changes: diffusers' name -> path in the tree.

    Raises:
      UserError: an entry of `layers` is no layer; `where` goes before the field's name.
    """
    check(isinstance(params, Mapping), "adapters need parameters in nested dicts, as Flax has them")
    kernels = [path for path, leaf in traverse_util.flatten_dict(params).items() if path[-1] == "kernel" and leaf.ndim in (2, 4)]
    layers = {DIFFUSERS.torch_name(path).removesuffix(".weight"): path[:-1] for path in sorted(kernels)}
    there = [end for end in _OF_ATTENTION if any(_ends(name, end) for name in layers)]
    wanted = lora.layers or there or _OF_ATTENTION[:1]
    for end in wanted:
        if not any(_ends(name, end) for name in layers):
            ends = sorted({re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name)[0] for name in layers})
            check(False, f"{where}layers: the network has no layer {end!r}; it has {', '.join(ends)}")
    return {name: path for name, path in layers.items() if any(_ends(name, end) for end in wanted)}


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def init(lora: LoraOptions, params: PyTree, rng: Rng) -> PyTree:
    """Returns a new adapter, float32, for `params` (arrays or shapes), drawn from the run's base key `rng`."""
    flat, adapter = traverse_util.flatten_dict(params), {}
    for number, path in enumerate(adapted(lora, params).values()):
        *inputs, outputs = flat[*path, "kernel"].shape
        draw = jax.random.normal(jax.random.fold_in(jax.random.fold_in(rng, _INIT), number), (*inputs, lora.rank), jnp.float32)
        adapter[*path, "lora_A", "kernel"] = draw / lora.rank
        adapter[*path, "lora_B", "kernel"] = jnp.zeros((*(1 for _ in inputs[:-1]), lora.rank, outputs), jnp.float32)
    return traverse_util.unflatten_dict(adapter)


@partial(jax.jit, static_argnums=0)
def merge(lora: LoraOptions, params: PyTree, adapter: PyTree) -> PyTree:
    """Returns `params` with every adapted kernel as equation (1) has it; differentiable in `adapter`."""
    merged = dict(traverse_util.flatten_dict(params))
    pairs = traverse_util.flatten_dict(adapter)
    for *path, _, _ in [path for path in pairs if path[-2] == "lora_A"]:
        a, b = (pairs[*path, name, "kernel"] for name in ("lora_A", "lora_B"))
        # In full precision on accelerators too: a run, its samples and its export must have the same W'.
        change = jnp.tensordot(a, b.reshape(b.shape[-2:]), 1, precision="highest")
        merged[*path, "kernel"] = merged[*path, "kernel"] + lora.scale * change
    return traverse_util.unflatten_dict(merged)


def scaled(adapter: PyTree, factor: float) -> PyTree:
    """Returns the adapter whose change of each kernel is `factor` times that of `adapter`."""
    pairs = traverse_util.flatten_dict(adapter)
    return traverse_util.unflatten_dict({path: factor * leaf if path[-2] == "lora_B" else leaf for path, leaf in pairs.items()})
