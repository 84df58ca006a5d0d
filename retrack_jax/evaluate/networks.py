"""Which feature networks the config names, and where their weights come from.

One run can use several: MNIST's FID is Inception's, its inception scores are a digit classifier's.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import UserError, check, check_choice
from retrack_jax.data.commands import MNIST_FILE, WEIGHTS
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.sources.tshirts import TSHIRT_LABEL, is_tshirt
from retrack_jax.evaluate.results import Inapplicable, Unavailable
from retrack_jax.files import file_digest
from retrack_jax.metrics.features.inception import inception_network
from retrack_jax.metrics.features.network import MNIST_RESNET, SCORE_NETWORKS, FeatureNetwork
from retrack_jax.metrics.features.resnet import mnist_resnet_network, sscd_network
from retrack_jax.metrics.inception_score import OFFICIAL
from retrack_jax.weights.folder import open_file, present

MNIST_SHAPE = (28, 28, 1)
log = logging.getLogger(__name__)


def feature_network(name: str, images: ImageSet, folder, weights_dir, resize: str) -> FeatureNetwork:
    """Returns the network that `config.eval.features` names.

    It is `inception`, FID's own, from `weights_dir` and with the rule `resize`; or `digits`, a small classifier that is trained
    here once on the digits of the training `images` and kept in `folder`.

    Raises:
      Unavailable: as `from_file`.
      Inapplicable: `digits`, and the images are not labeled digits of its size.
    """
    if name == "digits":
        return _digits(images, folder)
    return from_file(weights_dir, WEIGHTS["inception"][0], functools.partial(inception_network, resize=resize))


def load_sscd(weights_dir) -> FeatureNetwork:
    """Returns SSCD's network. Raises `Unavailable` as `from_file`."""
    return from_file(weights_dir, WEIGHTS["sscd"][0], sscd_network)


def load_mnist_resnet(weights_dir, official: bool = False) -> FeatureNetwork:
    """Returns the classifier of the official MNIST experiment, in training mode if `official`; raises as `from_file`."""
    return from_file(weights_dir, (MNIST_FILE,), functools.partial(mnist_resnet_network, official=official))


def check_score_network(name: str, wanted: Sequence[str], image_shape: tuple[int, ...]) -> None:
    """Raises `UserError` if the inception scores that are wanted cannot be of images `(H, W, C)` or of the network `name`."""
    check_choice("config.eval.score_network", name, SCORE_NETWORKS)
    own = name == MNIST_RESNET
    check(
        own or OFFICIAL not in wanted,
        f"config.eval.metrics has {OFFICIAL}, which only the MNIST classifier gives; use configs/mnist_tshirt.py, where "
        "config.eval.score_network is mnist_resnet, or leave that metric out",
    )
    check(
        not own or tuple(image_shape) == MNIST_SHAPE or not {"inception_score", OFFICIAL} & set(wanted),
        f"config.eval.score_network is mnist_resnet, which takes images of {MNIST_SHAPE}, and these are {tuple(image_shape)}; "
        "set it to features",
    )


def from_file(weights_dir, names: Sequence[str], load: Callable[[Mapping[str, np.ndarray], str], Any]) -> Any:
    """Returns `load(tensors, SHA-256)` of the first of the files `names` that is in `weights_dir`.

    Raises:
      Unavailable: none of them is there, or it is damaged or of another network; on every process if on one.
    """

    def load_first() -> Any:
        folder = Path(weights_dir).expanduser()
        path = next(iter(present(folder, names)), None)
        if path is None:
            raise Unavailable(f"no {' or '.join(names)} in {folder}; --config.mode=check prints the command that gets it")
        try:
            return load(open_file(path), file_digest(path))
        except UserError as error:
            raise Unavailable(f"{path}: {error}") from error

    # Each host has its own folder, and all hosts use the network together.
    return parallel.together(load_first, Unavailable)


def _digits(images: ImageSet, folder) -> FeatureNetwork:
    from retrack_jax.metrics.features.digit_net import NUM_CLASSES, SIDES, load_digit_net, save_digit_net, train_digit_net

    labeled = images.labels is not None and np.isin(images.labels, (*range(NUM_CLASSES), TSHIRT_LABEL)).all()
    if not labeled or images.images.shape[1:] not in [(side, side, 1) for side in SIDES]:
        raise Inapplicable(
            "config.eval.features is digits, a classifier that is trained on gray images of "
            f"{' or '.join(f'{side} x {side}' for side in SIDES)} with labels 0 to {NUM_CLASSES - 1}, and those of {images.name} "
            "are not such; set it to inception, in another --workdir"
        )
    path = folder / "digit_net.npz"

    def make() -> None:
        if not path.exists():
            digit = ~is_tshirt(images)
            log.info("training the digit classifier behind fid")
            save_digit_net(path, train_digit_net(images.images[digit], images.labels[digit], seed=0))

    parallel.on_main(make)
    return load_digit_net(path)
