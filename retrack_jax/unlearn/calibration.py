"""How far to go from the pretrained to the unlearned parameters, so that the loss on the forgotten images is a given one.

No method stops where a model retrained without the images would be. Along the straight line

    (1)  theta(alpha) = theta_0 + alpha (theta - theta_0)

the loss on the forgotten images rises from that of the pretrained model, and the alpha that gives the loss of an unseen image is
one search away, whatever the method.
"""

from collections.abc import Callable

import jax

from retrack_jax.notation import PyTree

UNSEEN = "unseen"  # the reference that the verdict estimates (evaluate/verdict.py)
# Beyond twice the whole way, the line leaves what any training has seen.
LARGEST = 2.0
# In alpha. The noise of a loss of 64 draws moves alpha by more.
_TOLERANCE = 0.005


@jax.jit
def between(start: PyTree, end: PyTree, alpha: float) -> PyTree:
    """Returns (1): `start` at alpha 0, `end` at alpha 1."""
    return jax.tree.map(lambda a, b: a + alpha * (b - a), start, end)


def line_search(loss: Callable[[float], float], reference: float) -> dict:
    """Returns where `loss(alpha)` is `reference`, for alpha from 0 to `LARGEST`.

    Args:
      loss: the mean loss on the forgotten images at alpha; it is called about 8 times.
      reference: the loss to reach, in the same unit.

    Returns:
      {"alpha", "loss", "reference", "curve": [[alpha, loss], ...]}; the curve holds every point that was measured, in the order
      of alpha. Alpha is 0 if the loss at 0 is the reference or above, and `LARGEST` if it stays below the reference.
    """
    from scipy.optimize import brentq

    curve: dict[float, float] = {}

    def gap(alpha: float) -> float:
        if alpha not in curve:
            curve[alpha] = loss(alpha)
        return curve[alpha] - reference

    if gap(0.0) >= 0:
        alpha = 0.0
    else:
        high = next((end for end in (1.0, LARGEST) if gap(end) >= 0), None)
        alpha = LARGEST if high is None else brentq(gap, 0.0 if high == 1.0 else 1.0, high, xtol=_TOLERANCE)
    gap(alpha)
    return {"alpha": alpha, "loss": curve[alpha], "reference": reference, "curve": [list(one) for one in sorted(curve.items())]}
