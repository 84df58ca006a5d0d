"""The training state: one pytree, replicated un-stacked over devices; a step returns a new one."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from retrack_jax import parallel
from retrack_jax.notation import Array, PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run must have to repeat itself.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: what is trained, float32: the network's parameters, or an adapter's (lora.py).
      ema_params: the exponential moving average of `params`, or None if the recipe keeps none.
      ema_decay: `step -> decay` of the moving average, or None.
    """

    step: Array
    params: PyTree
    opt_state: optax.OptState
    ema_params: PyTree | None
    tx: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    ema_decay: Callable[[Array], Array] | None = flax.struct.field(pytree_node=False, default=None)

    def apply_gradients(self, grads: PyTree) -> "TrainState":
        """Returns the state after one update of `params`, and of their moving average if there is one."""
        # optax raises floats to integer powers, which the strict promotion in our tests refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        ema_params = self.ema_params
        if self.ema_decay is not None:
            decay = self.ema_decay(self.step)
            ema_params = jax.tree.map(lambda ema, new: decay * ema + (1 - decay) * new, ema_params, params)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, ema_params=ema_params)

    @property
    def eval_params(self) -> PyTree:
        """The parameters to sample from: the moving average if there is one."""
        return self.params if self.ema_params is None else self.ema_params


def create_state(
    params: PyTree, tx: optax.GradientTransformation, ema_decay: Callable[[Array], Array] | None = None
) -> TrainState:
    """Returns the state at step 0. The moving average starts at a copy of `params`, because the step donates its buffers."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(tx.init)(params),  # leaf by leaf it would compile a program for every shape
        ema_params=None if ema_decay is None else parallel.copy(params),
        tx=tx,
        ema_decay=ema_decay,
    )
