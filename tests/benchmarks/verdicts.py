"""How often each method's runs are called what, over finished workdirs: the error rates of the verdict's rule.

    python -m retrack_jax.main --config=configs/digits_tshirt.py:all --config.seeds=0,1,2
    python -m tests.benchmarks.verdicts runs/digits_tshirt [more workdirs]

The pretrained model is known to remember the T-shirt, and the retrained models to have forgotten it and to have kept the
rest, so their rows are the errors of the rule. The others are to be read together with their losses, which are printed too.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrack_jax import files
from retrack_jax.report.catalogue import method_label
from retrack_jax.report.tables import method_order, text_table

_REMEMBERED = {True: "remembered", False: "not remembered", None: "cannot be told"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=Path)
    workdirs = parser.parse_args(arguments).workdirs
    runs = [files.read_json(path) for workdir in workdirs for path in sorted(workdir.glob("*/seed*/metrics.json"))]
    judged = [run for run in runs if run.get("verdict")]
    print(f"{len(judged)} of {len(runs)} runs have a verdict; the command that made the others adds it")
    for target in sorted({run["target"] for run in judged}):
        mine = [run for run in judged if run["target"] == target]
        print(f"\n{target}\n{_table(mine)}")


def _table(runs: Sequence[dict]) -> str:
    before = Counter(_REMEMBERED[run["verdict"]["remembered_before"]] for run in runs)
    rows = [("pretrained", str(len(runs)), _shares(before), "", _losses(runs, "before"))]
    by_method = {run["method"]: [one for one in runs if one["method"] == run["method"]] for run in runs}
    for method in method_order(by_method):
        verdicts = [run["verdict"] for run in by_method[method]]
        called = [_shares(Counter(verdict[name] for verdict in verdicts)) for name in ("forgotten", "kept")]
        rows.append((method_label(method), str(len(verdicts)), *called, _losses(by_method[method], "after")))
    heads = ("method", "runs", "the target", "the rest", "loss on the target")
    return text_table(list(zip(heads, zip(*rows, strict=True), strict=True)))


def _shares(counts: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _losses(runs: Sequence[dict], when: str) -> str:
    means = [np.mean([file[when] for file in run["verdict"]["files"]]) for run in runs if run["verdict"]["files"]]
    return f"{np.mean(means):.1f} ({np.min(means):.1f} to {np.max(means):.1f})" if means else ""


if __name__ == "__main__":
    main()
