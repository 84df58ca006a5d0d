"""Draws docs/images/concept.svg: denoising paths of the exact denoiser in two dimensions, before and after ReTrack.

    python docs/concept_figure.py

No network is trained. Before, the denoiser is the best one for all points; after, the one that ReTrack's loss teaches: at noisy
versions of the forgotten point, the noise that leads to its K nearest remaining points.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from retrack_jax.diffusion import Schedule
from retrack_jax.unlearn.losses import retrack_target

IMAGES = Path(__file__).parent / "images"
NUM_NEIGHBORS = 6
TIMESTEPS = np.linspace(999, 0, 200).round().astype(int)


def points(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the remaining points `[R, 2]` on an arc, and the forgotten one `[2]`, away from it."""
    angles = np.linspace(0.15, 2.6, 26)
    arc = 1.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return arc + 0.06 * rng.standard_normal(arc.shape), np.array([1.55, -1.15])


def paths(starts: np.ndarray, data: np.ndarray, schedule: Schedule) -> np.ndarray:
    """Returns DDIM's paths `[T, N, 2]` from `starts` `[N, 2]` under the exact denoiser of `data` `[M, 2]`."""
    alpha_bar = schedule.alpha_bar64
    neighbors = jnp.broadcast_to(jnp.asarray(data, jnp.float32), (len(starts), *data.shape))
    x, steps = starts, [starts]
    for now, then in zip(TIMESTEPS, [*TIMESTEPS[1:], None], strict=True):
        gamma, sigma = np.sqrt(alpha_bar[now]), np.sqrt(1 - alpha_bar[now])
        each = jnp.ones(len(x), jnp.float32)
        eps = np.asarray(retrack_target(jnp.asarray(x, jnp.float32), neighbors, gamma * each, sigma * each)[0])
        next_gamma, next_sigma = (1.0, 0.0) if then is None else (np.sqrt(alpha_bar[then]), np.sqrt(1 - alpha_bar[then]))
        x = next_gamma * (x - sigma * eps) / gamma + next_sigma * eps
        steps.append(x)
    return np.stack(steps)


def main() -> None:
    rng = np.random.default_rng(0)
    remain, forget = points(rng)
    schedule = Schedule()
    starts = rng.standard_normal((400, 2))
    memorized = np.concatenate([remain, np.repeat(forget[None], 8, axis=0)])
    before = paths(starts, memorized, schedule)
    ends_there = np.linalg.norm(before[-1] - forget, axis=1) < 0.05
    led_to_it = np.flatnonzero(ends_there & (starts[:, 0] < 1.2))[:9]  # noise to the right would lie under the label
    nearest = np.argsort(np.linalg.norm(remain - forget, axis=1))[:NUM_NEIGHBORS]
    after = paths(starts[led_to_it], remain[nearest], schedule)

    matplotlib.rcParams.update({"svg.hashsalt": "concept", "font.family": "sans-serif", "font.size": 10})
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.0), sharex=True, sharey=True, facecolor="white")
    panels = ("before", before[:, led_to_it], "#c2410c"), ("after", after, "#1d4ed8")
    for axis, (title, drawn, color) in zip(axes, panels, strict=True):
        axis.plot(drawn[..., 0], drawn[..., 1], color=color, linewidth=1.1, alpha=0.75)
        axis.scatter(*drawn[0].T, s=9, color=color, alpha=0.6, zorder=3)
        axis.scatter(*remain.T, s=22, color="#9ca3af", zorder=2)
        axis.scatter(*remain[nearest].T, s=30, color="#374151", zorder=4)
        axis.scatter(*forget, s=150, marker="*", color="#c2410c" if title == "before" else "white", edgecolor="#c2410c", zorder=5)
        axis.set_title(title)
        axis.set_aspect("equal")
        axis.axis("off")
    axes[0].annotate("memorized image", forget, (8, -6), textcoords="offset points", va="top", color="#c2410c")
    axes[1].annotate("its neighbors", remain[nearest].mean(axis=0), (12, 6), textcoords="offset points", color="#374151")
    leftmost = min(starts[led_to_it], key=lambda start: start[0])
    axes[0].annotate("noise", leftmost, (-34, -3), textcoords="offset points", color="#c2410c")
    axes[0].set_xlim(-2.0, 2.9)
    figure.tight_layout(pad=0.3)
    figure.savefig(IMAGES / "concept.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
