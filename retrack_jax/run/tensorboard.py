"""What TensorBoard shows, if `config.tensorboard` asks for it: losses, learning rates, the metrics, pictures and the verdict.

The event files lie in `tensorboard/` next to `log.jsonl`. They are a copy for looking at; no run reads them.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import UserError, check
from retrack_jax.config.options import Options
from retrack_jax.report.verdict import in_words

Scalars = Callable[[int, Mapping[str, float]], None]


def check_tensorboard(options: Options, root) -> None:
    """Raises `UserError` if `config.tensorboard` is set and its files cannot be written below `root`."""
    if not options.tensorboard:
        return
    check("://" not in str(root), f"config.tensorboard writes to local folders only, not to {root}; set it to False")
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError("config.tensorboard needs tensorboardX; install it with `pip install tensorboardX`")


@contextmanager
def scalars_of_training(options: Options, folder, name: str, rate: Callable, start: int) -> Iterator[Scalars | None]:
    """Yields a function that records the metrics of a step and its learning rate, or None if the config does not ask for it.

    Args:
      folder: of the training run.
      name: goes before `_learning_rate`.
      rate: step -> learning rate, counted from 0.
      start: the step that the run continues from; later records of an earlier try are dropped.
    """
    with _writer(options, folder, purge_step=start + 1) as events:
        if events is None:
            yield None
            return

        def record(step: int, values: Mapping[str, float]) -> None:
            for key, value in {**values, f"{name}_learning_rate": rate(step - 1)}.items():
                events.add_scalar(key, float(value), step)

        yield record


def show_results(options: Options, folder, metrics: Mapping) -> None:
    """Records the metrics and the verdict of a finished run, and the pictures in its `folder`."""
    with _writer(options, folder) as events:
        if events is None:
            return
        from PIL import Image

        for name, value in metrics["unlearned"].items():
            events.add_scalar(f"metrics/{name}", float(value), metrics["steps"])
        events.add_text("verdict", in_words(metrics["verdict"]), metrics["steps"])
        for picture in sorted(folder.glob("*.png")):
            with picture.open("rb") as file:
                pixels = np.asarray(Image.open(file).convert("RGB"))
            events.add_image(picture.stem, pixels, metrics["steps"], dataformats="HWC")


@contextmanager
def _writer(options: Options, folder, **how):
    """Yields tensorboardX's writer into `folder`, on process 0 alone and if the config asks for it; else None."""
    if not options.tensorboard or not parallel.is_main_process():
        yield None
        return
    from tensorboardX import SummaryWriter

    path = folder / "tensorboard"
    try:
        events = SummaryWriter(str(path), **how)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; set config.tensorboard to False or free it") from error
    with events:
        yield events
