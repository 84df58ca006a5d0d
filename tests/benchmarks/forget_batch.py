"""What fewer noisy copies of the forgotten image a step cost in quality and save in time: ReTrack on the digits.

    python -m tests.benchmarks.forget_batch --workdir=runs/digits_tshirt --out=runs/forget_batch
        [--sizes=8,16,32,64] [--seeds=0,1,2]

`--workdir` is a finished digits run, whose pretrained model and samples are used. Prints a table in Markdown.
"""

import argparse
import json
import shutil
from pathlib import Path

from configs.digits_tshirt import get_config
from retrack_jax.api import run
from retrack_jax.cli.process import set_up_jax, set_up_logs

METRICS = ("frequency", "fid", "forget_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--sizes", default="8,16,32,64")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    set_up_logs()
    set_up_jax(get_config().compute.cpu_devices)
    found = {}
    for size in map(int, options.sizes.split(",")):
        folder = Path(options.out) / str(size)
        for part in ("pretrained", "features"):
            if not (folder / part).exists():
                shutil.copytree(Path(options.workdir) / part, folder / part)
        config = get_config()
        config.seeds = tuple(map(int, options.seeds.split(",")))
        config.unlearn.forget_batch_size = size
        config.eval.metrics = METRICS
        found[size] = run(config, folder)["methods"]["retrack"]
    (Path(options.out) / "forget_batch.json").write_text(json.dumps(found, indent=2))
    print("| forgotten images per step (beside 64 remaining) | seconds | frequency | FID | loss on forgotten |")
    print("| --- | --- | --- | --- | --- |")
    for size, entry in found.items():
        values = [entry["metrics"][name] for name in METRICS]
        cells = " | ".join(f"{value['mean']:.4g} ± {value['std'] or 0:.2g}" for value in values)
        print(f"| {size} | {entry['unlearn_seconds']['mean']:.1f} | {cells} |")


if __name__ == "__main__":
    main()
