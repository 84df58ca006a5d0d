"""What a feature network is to the metrics: a named, digested function from images to features and logits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import UserError, check
from retrack_jax.files import array_digest
from retrack_jax.metrics.arrays import check_images, unit_images
from retrack_jax.metrics.blocks import shown_progress
from retrack_jax.notation import PyTree

NETWORKS = ("digits", "inception")  # behind fid and the metrics like it
MNIST_RESNET = "mnist_resnet"
SCORE_NETWORKS = ("features", MNIST_RESNET)  # behind the inception scores; features: the network behind fid


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A feature network. Call it with images to get `{"features": [N, D], "logits": [N, C]}` (logits only if it has classes).

    Attributes:
      name: what results call it, such as `inception-v3-fid`.
      digest: SHA-256 of its weights or of the file that they came from, which results quote and caches are keyed by.
      resize: the rule that brings images to the network's size, such as `torchmetrics`, `tf1`, `none`.
      params: the network's variables.
      apply_fn: `apply_fn(params, batch) -> dict of arrays`, a pure function on one batch of prepared images.
      prepare: NumPy function from images `[N, H, W, C]`, uint8 or floats in [0, 1], to what `apply_fn` takes.
      batch_size: images per call over the devices of one process, each with an equal share (rounded up).
      pad: fill the last batch up, so that one shape is compiled. False if an image's output depends on its batch: then a
        batch lies on one device, and every process computes all of them.
      num_labels: its logits are those of the labels 0, ..., num_labels - 1 of its training data; 0 if its classes are others,
        such as ImageNet's, or it has none.
    """

    name: str
    digest: str
    resize: str
    params: PyTree
    apply_fn: Callable
    prepare: Callable
    batch_size: int = 64
    pad: bool = True
    num_labels: int = 0

    @cached_property
    def _apply(self) -> Callable:
        """Returns the function from prepared images to outputs, both `[n, ...]`; compiled once for every n."""

        def apply(params, batch):
            # TPU and GPU would otherwise multiply in bfloat16 or TF32, too coarse for features that are quoted to 1e-4.
            with jax.default_matmul_precision("highest"):
                return self.apply_fn(params, batch)

        if not self.pad:
            one_device = jax.jit(apply)
            return lambda batch: one_device(self.params, batch)
        p_apply, params = parallel.pmap(apply, in_axes=(None, 0), out_axes=0), parallel.replicate(self.params)
        return lambda batch: parallel.unshard_batch(p_apply(params, parallel.shard_batch(batch)))

    @property
    def description(self) -> str:
        """The name, resize rule and short digest, for provenance."""
        return f"{self.name} (resize {self.resize}, sha256 {self.digest[:16]})"

    def __call__(self, images, desc: str = "") -> dict[str, np.ndarray]:
        """Returns the network's outputs for all images, float32, each with N rows; processes share the images.

        Images are `[N, H, W, C]`, uint8 or floats in [0, 1]; a memory map is read one batch at a time. `desc` labels a progress
        bar over this process's images; without it there is none. Raises `UserError` for NaN or a shape that the network does not
        take.
        """
        check(images.ndim == 4 and len(images) > 0, f"images have shape {images.shape}; expected at least one, [N, H, W, C]")
        if not self.pad:
            return self._of_this_process(images, 0, len(images), desc)
        return parallel.split_rows(lambda first, stop: self._of_this_process(images, first, stop, desc), len(images))

    def _of_this_process(self, images, first: int, stop: int, desc: str) -> dict[str, np.ndarray]:
        size, devices = self.batch_size, jax.local_device_count()
        if self.pad:
            size = -(-size // devices) * devices
        parts = []
        with shown_progress(desc, stop - first) as bar:
            for start in range(first, stop, size):
                block = check_images("images", np.asarray(images[start : min(start + size, stop)]))
                batch = self.prepare(block)
                missing = size - len(batch)
                if missing and self.pad:
                    batch = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
                outputs = self._apply(batch)
                parts.append({name: np.asarray(value)[: len(block)] for name, value in outputs.items()})
                bar.update(len(block))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def params_digest(params: PyTree) -> str:
    """Returns the SHA-256 over names and values of a tree of parameters."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = "".join(jax.tree_util.keystr(path) for path, _ in leaves)
    return array_digest(np.frombuffer(names.encode(), np.uint8), *[np.asarray(leaf) for _, leaf in leaves])


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Returns images with three channels; gray ones are repeated. Raises `UserError` for any other number of channels."""
    channels = images.shape[-1]
    if channels == 1:
        return np.repeat(images, 3, axis=-1)
    check(channels == 3, f"images have {channels} channels; a color network takes 3, or 1 (gray, repeated)")
    return images


def unit_grey(side: int) -> Callable:
    """Returns a `prepare` that takes gray images of `side` x `side`, uint8 or floats in [0, 1], to floats in [0, 1]."""

    def prepare(images):
        if images.shape[1:] != (side, side, 1):
            raise UserError(f"images are {images.shape[1:]}; this network takes ({side}, {side}, 1)")
        return unit_images("images", images)

    return prepare
