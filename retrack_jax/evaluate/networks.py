"""Which feature network the config names, and where its weights come from."""

import logging
from collections.abc import Callable
from pathlib import Path

from retrack_jax import parallel
from retrack_jax.checkpoints.torch_reader import read_torch, read_torchscript
from retrack_jax.checks import UserError, check_choice
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.digits import TSHIRT_LABEL
from retrack_jax.evaluate.results import Unavailable
from retrack_jax.files import file_digest
from retrack_jax.metrics.features.inception import FILE as INCEPTION_FILE
from retrack_jax.metrics.features.inception import inception_network
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.features.resnet import sscd_network

NETWORKS = ("digits", "inception")
SSCD_FILE = "sscd_disc_mixup.torchscript.pt"
log = logging.getLogger(__name__)


def feature_network(name: str, images: ImageSet, folder, weights_dir, resize: str) -> FeatureNetwork:
    """Returns the network that `config.eval.features` names.

    Args:
      name: `inception`: FID's own; `digits`: a small classifier that is trained here once on the digits of `images`, kept in `folder`.
      images: the training images, with labels.
      folder: where a network trained here is kept.
      weights_dir: where downloaded weights lie.
      resize: Inception's resize rule, `torchmetrics` or `tf1`.

    Raises:
      Unavailable: the weights are not there, or are not this network's.
    """
    check_choice("config.eval.features", name, NETWORKS)
    if name == "digits":
        return _digits(images, folder)
    return _from_file(
        weights_dir, INCEPTION_FILE, lambda path: inception_network(read_torch(path), file_digest(path), resize=resize)
    )


def load_sscd(weights_dir) -> FeatureNetwork:
    """Returns SSCD's network from `weights_dir`. Raises `Unavailable` where its file is missing or damaged."""
    return _from_file(weights_dir, SSCD_FILE, lambda path: sscd_network(read_torchscript(path), file_digest(path)))


def _from_file(weights_dir, name: str, load: Callable[[Path], FeatureNetwork]) -> FeatureNetwork:
    path = Path(weights_dir).expanduser() / name
    if not path.is_file():
        raise Unavailable(f"no {name} in {path.parent}; --config.mode=check prints the command that gets it")
    try:
        return load(path)
    except UserError as error:
        raise Unavailable(f"{path}: {error}") from error


def _digits(images: ImageSet, folder) -> FeatureNetwork:
    from retrack_jax.metrics.features.digit_net import load_digit_net, save_digit_net, train_digit_net

    path = folder / "digit_net.npz"
    if not path.exists():
        digit = images.labels != TSHIRT_LABEL
        log.info("training the digit classifier behind fid")
        network = train_digit_net(images.images[digit], images.labels[digit], seed=0)
        if not parallel.is_main_process():
            return network
        save_digit_net(path, network)
    return load_digit_net(path)
