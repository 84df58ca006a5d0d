"""Which feature network the config names, and where its weights come from."""

import logging

from retrack_jax import parallel
from retrack_jax.checks import check_choice
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.digits import TSHIRT_LABEL
from retrack_jax.metrics.features.network import FeatureNetwork

NETWORKS = ("digits", "inception")
log = logging.getLogger(__name__)


def feature_network(name: str, images: ImageSet, folder) -> FeatureNetwork:
    """Returns the network that `config.eval.features` names.

    Args:
      name: `digits`: a small classifier that is trained here once on the digits of `images` and kept in `folder`.
      images: the training images, with labels.
      folder: where a network trained here is kept.
    """
    check_choice("config.eval.features", name, NETWORKS)
    return _digits(images, folder)


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
