"""A tree of arrays as a few arrays: large leaves by themselves, all small ones in one vector.

A UNet has hundreds of biases and scales, and each leaf has a fixed cost in every operation over the whole tree. On CPU it is a
meeting of all devices in a collective, and a separate instruction to compile and run in an update. Programs for accelerators
have the same vector, because checkpoints hold the optimizer's state as it is packed, and a run may continue on another platform.
"""

from collections.abc import Callable

import jax
from jax.flatten_util import ravel_pytree

from retrack_jax.notation import PyTree

_SMALL = 1 << 17  # values of a leaf that is packed with others


def pack(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Returns `{"large": [leaf, ...], "small": vector}` with the values of `tree`, and the function that unpacks it.

    Elementwise operations, and norms and means over all values, are the same on the packed tree. `small` has the dtype that its
    leaves promote to; unpacking restores the dtype of each leaf.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_large = [leaf.size > _SMALL for leaf in leaves]
    large = [leaf for leaf, apart in zip(leaves, is_large, strict=True) if apart]
    small, split = ravel_pytree([leaf for leaf, apart in zip(leaves, is_large, strict=True) if not apart])

    def unpack(packed: PyTree) -> PyTree:
        large, small = iter(packed["large"]), iter(split(packed["small"]))
        return structure.unflatten([next(large if apart else small) for apart in is_large])

    return {"large": large, "small": small}, unpack
