"""What brings ReTrack nearer to a retrained model, or does not: variants of its loss and recipe on the digits, with one budget.

    python -m tests.benchmarks.closer --workdir=runs/digits_tshirt --out=runs/closer [--results=docs/results]

`--workdir` is a finished run of configs/digits_tshirt.py with retrained seeds 0 to 4. Each variant takes the lambda of `LAMBDAS`
whose loss on the T-shirt is nearest to the retrained models' mean on seed 100, and is reported on `SEEDS`, 500 samples a model.
Ratios are of the loss on the T-shirt to the retrained models', by eighths of t in which that is above 1, at the verdict's noises.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.digits_tshirt import get_config
from retrack_jax.cli.process import set_up_jax, set_up_logs
from retrack_jax.diffusion.conversions import expand
from retrack_jax.metrics.membership import prediction_interval
from retrack_jax.unlearn import losses
from retrack_jax.unlearn.methods import METHODS, Method, Terms
from retrack_jax.unlearn.options import RetrackOptions
from tests.benchmarks.measure import Table, parser_of
from tests.benchmarks.sweeps import PARTS, TUNING_SEED, Variant, mean_and_deviation, measured

LAMBDAS = (0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.15)
SEEDS = (0, 1, 2)
METRICS = ("frequency", "fid", "nll_bits_per_dim", "forget_loss")


@dataclass(frozen=True, kw_only=True)
class VariedOptions(RetrackOptions):
    """ReTrack without its unlearning term below `t_low`, and with p_k ~ exp(-||v_k||^2 / (2 temperature))."""

    t_low: int = 0
    temperature: float = 1.0


def _terms(context, remain, forget) -> tuple:
    """Returns the unlearning and the retain term, of which ReTrack's loss is the weighted sum."""
    options = context.options
    points_remain, points = context.noise(remain), context.noise(forget)
    eps_remain, eps_forget = context.predict(points_remain, points)
    v_BK = points.x_t[:, None] - expand(points.gamma, forget.neighbors) * forget.neighbors
    v_BK /= expand(points.sigma, forget.neighbors)
    bias_BK = -0.5 * (1 / options.temperature - 1) * jnp.sum(v_BK**2, axis=(2, 3, 4))
    unlearn_B = losses.retrack(eps_forget, points.x_t, forget.neighbors, points.gamma, points.sigma, bias_BK)
    if options.snr_cap is not None:
        unlearn_B = losses.snr_weight(points.gamma, points.sigma, options.snr_cap) * unlearn_B
    unlearn = jnp.where(points.t >= options.t_low, unlearn_B, 0.0).mean()
    return unlearn, context.retain_loss(eps_remain, points_remain).mean()


def varied(context, remain, forget) -> Terms:
    unlearn, retain = _terms(context, remain, forget)
    return Terms(main=context.options.lam * unlearn + (1 - context.options.lam) * retain)


def surgery(context, remain, forget) -> Terms:
    unlearn, retain = _terms(context, remain, forget)
    return Terms(main=(1 - context.options.lam) * retain, correction=context.options.lam * unlearn)


def without_conflict(main, correction, options):
    """Gradient surgery: what of the unlearning gradient points against the retain gradient is taken out."""

    def inner(a, b):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))

    share = jnp.minimum(inner(main, correction), 0.0) / inner(main, main)
    return jax.tree.map(lambda g, c: g + c - share * g, main, correction)


_STREAMS = frozenset({"remain", "forget", "neighbors"})
METHODS["varied"] = Method(streams=_STREAMS, terms=varied, options=VariedOptions)
METHODS["surgery"] = Method(streams=_STREAMS, terms=surgery, options=VariedOptions, combine=without_conflict)

CAP = {"snr_cap": 5.0}
# Name -> method, its options, other fields of config.unlearn.
VARIANTS = {
    "the paper's loss": ("retrack", {}, {}),
    "c = 1": ("retrack", {"snr_cap": 1.0}, {}),
    "c = 2": ("retrack", {"snr_cap": 2.0}, {}),
    "c = 5 (weighted)": ("retrack", CAP, {}),
    "c = 10": ("retrack", {"snr_cap": 10.0}, {}),
    "no unlearning below t = 50": ("varied", {"t_low": 50}, {}),
    "no unlearning below t = 150": ("varied", {"t_low": 150}, {}),
    "weighted, distillation": ("retrack", CAP, {"retain_loss": "distillation"}),
    "weighted, rate falls to 0": ("retrack", CAP, {"learning_rate_schedule": "cosine"}),
    "weighted, half the rate, twice the steps": ("retrack", CAP, {"learning_rate": 5e-5, "num_steps": 100}),
    "weighted, moving average": ("retrack", CAP, {"ema_max_decay": 0.95}),
    "weighted, 256 remaining beside 64": ("retrack", CAP, {"batch_size": 256, "forget_batch_size": 64}),
    "weighted, K = 3": ("retrack", CAP, {"num_neighbors": 3}),
    "weighted, K = 100": ("retrack", CAP, {"num_neighbors": 100}),
    "weighted, temperature 10": ("varied", CAP | {"temperature": 10.0}, {}),
    "weighted, gradient surgery": ("surgery", CAP, {}),
}


def variant(name: str, lam: float, metrics: tuple[str, ...], num_images: int) -> Variant:
    method, own, fields = VARIANTS[name]
    changes = {f"unlearn.{method}.{key}": value for key, value in {**own, "lam": lam}.items()}
    changes |= {f"unlearn.{key}": value for key, value in fields.items()}
    return Variant((name, f"{lam:g}"), method, changes | {"eval.metrics": metrics, "sampling.num_images": num_images})


def chosen(name: str, loss: float, out: Path, source: Path) -> float:
    """Returns the lambda of `LAMBDAS` that brings the loss on the T-shirt nearest to `loss`; it rises with lambda."""
    distances: dict[float, float] = {}
    place = LAMBDAS.index(0.015)
    while 0 <= place < len(LAMBDAS) and LAMBDAS[place] not in distances:
        one = variant(name, LAMBDAS[place], ("forget_loss",), 4)
        (found,) = measured(one, out / one.folder, source, (TUNING_SEED,))
        gap = float(np.log(found["forget_loss"] / loss))
        distances[LAMBDAS[place]] = abs(gap)
        place += 1 if gap < 0 else -1
    return min(distances, key=lambda lam: distances[lam])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    set_up_logs()
    set_up_jax(get_config().compute.cpu_devices)
    gold = Variant(("retrain", "500 samples"), "retrain", {"eval.metrics": METRICS, "sampling.num_images": 500})
    retrained = measured(gold, options.out / gold.folder, options.workdir, (0, 1, 2, 3, 4))
    parts = np.mean([one["by_parts"] for one in retrained], axis=0)
    shown = np.flatnonzero(parts > 1)
    low, high = prediction_interval([one["forget_loss"] for one in retrained])
    starts = [f"t from {1000 * part // PARTS}" for part in shown]
    table = Table("digits_closer", "variant", "lambda", "frequency", "FID", "NLL", "loss", "inside", *starts)
    cells = [mean_and_deviation(retrained, name, ".2f") for name in ("fid", "nll_bits_per_dim")]
    loss = f"{mean_and_deviation(retrained, 'forget_loss')} ({low:.1f} to {high:.1f})"
    table.add("**retrain**", "–", "0", *cells, loss, "–", *(f"{parts[part]:.1f}" for part in shown))
    source = options.out / gold.folder
    for name in VARIANTS:
        lam = chosen(name, np.mean([one["forget_loss"] for one in retrained]), options.out / "chosen", options.workdir)
        one = variant(name, lam, METRICS, 500)
        rows = measured(one, options.out / one.folder, source, SEEDS)
        source = options.out / one.folder
        inside = sum(low <= row["forget_loss"] <= high for row in rows)
        ratios = np.array([row["by_parts"] for row in rows])[:, shown].mean(axis=0) / parts[shown]
        cells = [mean_and_deviation(rows, "fid", ".2f"), mean_and_deviation(rows, "nll_bits_per_dim", ".2f")]
        loss = mean_and_deviation(rows, "forget_loss")
        frequency = f"{np.mean([row['frequency'] for row in rows]):.2%}"
        table.add(name, f"{lam:g}", frequency, *cells, loss, f"{inside} of {len(rows)}", *(f"{ratio:.2f}" for ratio in ratios))
    table.write(options.results, "python -m tests.benchmarks.closer --workdir=runs/digits_tshirt --out=runs/closer")


if __name__ == "__main__":
    main()
