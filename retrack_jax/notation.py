"""Names and notation, one name per thing throughout.

    x_0      clean image in the space that the network denoises: pixels in [-1, 1], or VAE latents    [B, H, W, C]
    t        timestep, int32 in [0, T)                                                                [B]
    eps      standard normal noise                                                                    [B, H, W, C]
    gamma    sqrt(alpha_bar_t), of a rectified flow 1 - sigma, of EDM 1                               [B]
    sigma    sqrt(1 - alpha_bar_t), of the others their own                                           [B]
    x_t      gamma x_0 + sigma eps                                                                    [B, H, W, C]
    eps_pred the network's noise prediction, or for a rectified flow its velocity eps - x_0           [B, H, W, C]
    R, F     the remaining and the forgotten training images

Inside dense tensor code names end with their axes: B batch, K neighbors, H W C image, N tokens or images, D features.
"""

from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array
PyTree = Any
Rng = jax.Array  # a key, or a batch of keys, from jax.random.key

# eps_fn(params, x_t [B, H, W, C], t [B], *condition) -> eps [B, H, W, C].
ModelEpsFn = Callable[..., Array]
# eps_fn(x_t [B, H, W, C], t [B]) -> eps [B, H, W, C]: the same, all else closed over.
EpsFn = Callable[[Array, Array], Array]
