"""Requests that come one after another: classes of the digits, forgotten one by one, and together for comparison.

    python -m tests.benchmarks.rounds --out=runs/rounds [--labels=7,1,4] [--methods=retrack,siss,erasediff] [--seeds=0]
        [--results=docs/results]

Round n forgets label n, starting from the model that round n - 1 left, with the labels before it excluded from the data. After
each round every label is counted again among 2,000 samples, by one classifier that saw all digits. Prints a table;
what `--out` holds already is not made again.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configs.digits_class import get_config
from retrack_jax.api import run
from retrack_jax.cli.process import set_up_jax, set_up_logs
from retrack_jax.data.sources.digits import digits_tshirt
from retrack_jax.data.target_names import slug
from retrack_jax.evaluate.networks import feature_network
from retrack_jax.metrics.feature_metrics import feature_stats
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.fid import fid
from retrack_jax.report.catalogue import method_label
from retrack_jax.run.workdir import Workdir
from tests.benchmarks.measure import Table, parser_of


def forget(out: Path, method: str, seed: int, *, target: str, exclude: str = "", checkpoint: Path | str = "") -> Path:
    """Returns the folder of a finished run that forgets `target`; without a checkpoint the model is pretrained in `out`."""
    config = get_config(method)
    config.seeds, config.targets = (seed,), (target,)
    config.checkpoint, config.data.exclude = str(checkpoint), exclude
    config.eval.metrics = ("label_share",)
    run(config, out)
    return Path(Workdir(out).run(method, seed, slug(target)))


def rounds(out: Path, method: str, seed: int, labels: list[int]) -> Iterator[tuple[str, Path, list[int]]]:
    """Yields what was asked for, the run that did it, and all labels that are gone by then."""
    checkpoint, exclude = "", ""
    for count, label in enumerate(labels):
        # The first round's workdir is every method's: it holds the pretrained model, which all start from.
        where = out / "first" if count == 0 else out / f"{method}-seed{seed}-round{count + 1}"
        folder = forget(where, method, seed, target=f"label:{label}", exclude=exclude, checkpoint=checkpoint)
        yield f"{label}, after {' and '.join(map(str, labels[:count]))}" if count else str(label), folder, labels[: count + 1]
        checkpoint, exclude = folder / "diffusers", "+".join(f"label:{gone}" for gone in labels[: count + 1])
    together = "+".join(f"label:{label}" for label in labels)
    yield "all of them at once", forget(out / "first", method, seed, target=together), labels


def row(network: FeatureNetwork, folder: Path, shown: list[int], gone: list[int]) -> list[str]:
    """Returns the shares of the `shown` labels among a run's samples, and their FID against the digits that are not `gone`."""
    images = digits_tshirt(0)
    with np.load(folder / "samples.npz") as archive:
        samples = archive["samples"]
    taken = np.argmax(network(samples)["logits"], axis=1)
    remaining = images.images[~np.isin(images.labels, gone)]
    distance = fid(feature_stats(network, samples).moments, feature_stats(network, remaining).moments)
    return [*(f"{np.mean(taken == label):.2%}" for label in shown), f"{distance:.2f}"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", default="7,1,4")
    parser.add_argument("--methods", default="retrack,siss,erasediff")
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    set_up_logs()
    set_up_jax(get_config().compute.cpu_devices)
    labels = [int(label) for label in options.labels.split(",")]
    network = None
    table = Table("digits_rounds", "method", "forgotten", *(f"share of {label}" for label in labels), "FID")
    for method in options.methods.split(","):
        for seed in map(int, options.seeds.split(",")):
            for asked, folder, gone in rounds(options.out, method, seed, labels):
                if network is None:
                    network = feature_network("digits", digits_tshirt(0), options.out / "first" / "features", "", "")
                    table.add("pretrained", "", *row(network, options.out / "first" / "pretrained", labels, []))
                table.add(f"{method_label(method)}, seed {seed}", asked, *row(network, folder, labels, gone))
    table.write(options.results, "python -m tests.benchmarks.rounds --out=runs/rounds")


if __name__ == "__main__":
    main()
