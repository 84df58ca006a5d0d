"""How often each method's runs are called what, over finished workdirs: the error rates of the verdict's rule.

    python -m retrack_jax.main --config=configs/digits_tshirt.py:all --config.seeds=0,1,2
    python -m tests.benchmarks.verdicts runs/digits_tshirt [more workdirs]

The pretrained model is known to remember the T-shirt, and the retrained models to have forgotten it and to have kept the
rest, so their rows are the errors of the rule. The others are to be read together with their losses, which are printed too.

Further errors come from the losses that are kept: each remaining image is taken for the forgotten one and compared with the
others. A model that was unlearned from something else has neither remembered it in particular nor forgotten it. Their turned
copies after unlearning were not measured; those before stand for them.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from retrack_jax import files
from retrack_jax.data.target_names import slug
from retrack_jax.evaluate.verdict import Losses, memory, verdict
from retrack_jax.report.catalogue import method_label
from retrack_jax.report.tables import method_order, text_table

_REMEMBERED = {True: "remembered", False: "not remembered", None: "cannot be told"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path)
    for workdir in parser.parse_args(arguments).workdirs:
        paths = sorted(workdir.glob("*/seed*/metrics.json"))
        runs = [(path.parent, run) for path in paths if (run := files.read_json(path)).get("verdict")]
        print(f"\n{workdir}: {len(runs)} of {len(paths)} runs have a verdict; the command that made the others adds it")
        for target in sorted({run["target"] for _, run in runs}):
            print(f"\n{target}\n{_table(workdir, [(folder, run) for folder, run in runs if run['target'] == target])}")


def _table(workdir: Path, runs: Sequence[tuple[Path, dict]]) -> str:
    name = slug(runs[0][1]["target"])
    kept = files.read_npz(workdir / "pretrained" / f"losses-{name}.npz")
    if (sideways := workdir / "pretrained" / f"sideways-{name}.npz").exists():
        kept["sideways"] = tuple(files.read_npz(sideways)[which] for which in ("before", "turned"))
    verdicts = [run["verdict"] for _, run in runs[:1]]  # all runs share the pretrained model
    first = len(verdicts[0]["files"])
    singles = Counter(_REMEMBERED[memory(losses).remembered] for losses, _ in _one_by_one(kept, first))
    rows = [("pretrained", "1", _REMEMBERED[verdicts[0]["remembered_before"]], "", _losses(verdicts, "before"), _shares(singles))]
    by_method = {run["method"]: [one for one in runs if one[1]["method"] == run["method"]] for _, run in runs}
    for method in method_order(by_method):
        verdicts = [run["verdict"] for _, run in by_method[method]]
        called = [_shares(Counter(one[name] for one in verdicts)) for name in ("forgotten", "kept")]
        after = [files.read_npz(folder / "losses.npz")["after"] for folder, _ in by_method[method]]
        singles = Counter(
            verdict(losses, one[places], losses.turned[losses.forgotten])["forgotten"]
            for one in after
            for losses, places in _one_by_one(kept, first)
        )
        rows.append((method_label(method), str(len(verdicts)), *called, _losses(verdicts, "after"), _shares(singles)))
    heads = ("method", "runs", "the target", "the rest", "loss on the target", "single remaining images")
    return text_table(list(zip(heads, zip(*rows, strict=True), strict=True)))


def _one_by_one(kept: dict, first: int) -> Iterator[tuple[Losses, np.ndarray]]:
    """Yields (losses, their rows) for each remaining image, of which `first` is the first row, in the forgotten ones' place."""
    count = int(kept["num_remaining"])
    for row in range(first, first + count):
        rows = np.array([row, *(other for other in range(first, first + count) if other != row)])
        arrays = {name: kept[name][rows] for name in ("before", "turned", "usable")}
        arrays["sideways"] = kept.get("sideways")
        yield Losses(names=[str(row)], num_forgotten=1, num_remaining=count - 1, is_random=False, **arrays), rows


def _shares(counts: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _losses(verdicts: Sequence[dict], when: str) -> str:
    means = [np.mean([file[when] for file in one["files"]]) for one in verdicts if one["files"]]
    return f"{np.mean(means):.1f} ({np.min(means):.1f} to {np.max(means):.1f})" if means else ""


if __name__ == "__main__":
    main()
