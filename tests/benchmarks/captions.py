"""What `beta`, `same_caption` and `anchor` do: a tiny Stable Diffusion forgets the two captioned pictures that it remembers.

    python -m tests.benchmarks.captions --out=runs/captions [--results=docs/results]

Every run is the command on tests/remembering_sd.py's pipeline and pictures, from the same start and with the same draws; only the
options of ReTrack differ. The last row is a UNet that never saw the two. What `--out` holds already is not made
again.
"""

import shutil
from pathlib import Path

from retrack_jax import files
from retrack_jax.evaluate.verdict import Losses, verdict
from retrack_jax.main import main as command
from tests.benchmarks.measure import Table, parser_of
from tests.make_remembering_sd import make
from tests.remembering_sd import REMEMBERED, flags, write_pictures, write_pipeline

# What the table calls a setting -> options of config.unlearn.retrack.
SETTINGS = {
    "beta 0 (the paper's loss)": {},
    "beta 10": {"beta": 10.0},
    "beta 100": {"beta": 100.0},
    "anchor 1": {"anchor": 1.0},
    "same_caption, anchor 1": {"same_caption": True, "anchor": 1.0},
}
COLUMNS = "ReTrack", "loss on the forgotten", "loss on the others", "verdict on the forgotten", "on the others"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out, table = options.out, Table("captions", *COLUMNS)
    if not (out / "pictures").exists():
        write_pipeline(out / "pipeline", write_pictures(out / "pictures"))
    works = {name: out / name.partition(" (")[0].replace(", ", "-").replace(" ", "_") for name in SETTINGS}
    first = next(iter(works.values()))
    for name, own in SETTINGS.items():
        work = works[name]
        if work != first and not work.exists():  # what is measured of the model before unlearning is the same
            shutil.copytree(first / "pretrained", work / "pretrained")
        fields = {f"unlearn__retrack__{option}": value for option, value in own.items()}
        assert command(flags(out, workdir=work, mode="unlearn", export="none", **fields)) == 0
        losses = _before(work / "pretrained")
        kept = files.read_npz(next((work / "retrack").glob("seed0-*")) / "losses.npz")
        found = verdict(losses, after := kept["after"], kept["turned"])
        remembered = "remembered" if found["remembered_before"] else "not remembered"
        if work == first:
            table.add("before", *_means(losses.before), remembered, "")
        table.add(name, *_means(after), found["forgotten"], found["kept"])
    unseen = _of_retrained(out)
    found = verdict(_before(first / "pretrained"), unseen.before, unseen.turned[unseen.forgotten])
    table.add("retrained without the two", *_means(unseen.before), found["forgotten"], found["kept"])
    table.write(options.results, "python -m tests.benchmarks.captions --out=runs/captions")


def _of_retrained(out: Path) -> Losses:
    """Returns the losses of a UNet that was trained on the ordinary pictures alone: those of a run that starts from it."""
    if not (out / "retrained").exists():
        make(folder=out / "retrained", copies=None)
        write_pipeline(out / "retrained_pipeline", out / "pictures", unet=out / "retrained")
    work = out / "of_retrained"
    assert command(flags(out, workdir=work, mode="unlearn", export="none", checkpoint=out / "retrained_pipeline")) == 0
    return _before(work / "pretrained")


def _before(folder: Path) -> Losses:
    arrays = files.read_npz(next(folder.rglob("losses-*.npz")))
    for path in folder.rglob("sideways-*.npz"):
        arrays["sideways"] = tuple(files.read_npz(path)[name] for name in ("before", "turned"))
    count = int(arrays.pop("num_remaining"))
    return Losses(names=list(REMEMBERED), num_forgotten=len(REMEMBERED), num_remaining=count, is_random=False, **arrays)


def _means(losses) -> list[str]:
    return [f"{losses[: len(REMEMBERED)].mean():.1f}", f"{losses[len(REMEMBERED) :].mean():.1f}"]


if __name__ == "__main__":
    main()
