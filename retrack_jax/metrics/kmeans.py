"""Success rate: does a k-means classifier call every sample of a prompt "not memorized"?

The official data ships the classifier as `kmeans_classifier.joblib`, a pickle, which could run any code if it were unpickled;
`weights.joblib_reader` reads it without running anything. Without such a file, `centers_from_labels` refits the centers from the
shipped labels: each is the mean of its cluster's images, to which k-means converges.

Equations:
1. cluster(x) = argmin_j ‖255 x - c_j‖², x in [0, 1] flattened with channels last (the official code; floats, not rounded).
2. success = 1 if cluster(x_i) = 0 for *all* samples of the prompt, else 0. Cluster 0 is the one that is not memorized.
"""

import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.weights.joblib_reader import read_joblib
from retrack_jax.weights.pickle_machine import Record

# config.eval.classifier -> where its centers come from.
CLASSIFIERS = {"joblib": "the shipped kmeans_classifier.joblib", "labels": "means of the shipped labels"}
_CLASSES = ("KMeans", "MiniBatchKMeans")


def read_centers(path) -> np.ndarray:
    """Returns float64 `[clusters, D]`, the centers in a joblib file of scikit-learn's `KMeans`, without unpickling it.

    Raises:
      UserError: the file is missing, is cut short, holds anything but a fitted `KMeans`, or asks to run code.
    """
    model = read_joblib(path)
    name = model.class_name if isinstance(model, Record) else type(model).__name__
    check(
        name.startswith("sklearn.") and name.rsplit(".")[-1] in _CLASSES, f"{path} holds a {name}; expected a scikit-learn KMeans"
    )
    centers = model.state.get("cluster_centers_") if isinstance(model.state, dict) else None
    check(
        isinstance(centers, np.ndarray) and centers.ndim == 2,
        f"{path} holds a KMeans without cluster centers; fit it, then save it again",
    )
    check(bool(np.isfinite(centers).all()), f"{path}: the cluster centers are not finite; download it again")
    return np.asarray(centers, np.float64)


def centers_from_labels(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns float64 `[2, D]`: the mean of the images labeled 0, then of those labeled 1, in [0, 255]. Raises if one is
    empty."""
    centers = []
    for label in (0, 1):
        members = np.flatnonzero(np.asarray(labels) == label)
        check(len(members) > 0, f"no image has label {label}; both clusters need images")
        total = np.zeros(images[0].size, np.float64)
        for index in members:  # one at a time: 512 x 512 x 3 float64 is 6 MB
            total += np.asarray(images[index], np.float64).reshape(-1)
        centers.append(total / len(members))
    return np.stack(centers)


def clusters(samples: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Returns int `[N]`, the nearest center of each sample `[N, H, W, C]` in [0, 1] (equation 1). Raises if the sizes
    differ."""
    flat = np.asarray(samples).reshape(len(samples), -1)
    if flat.shape[1] != centers.shape[1]:
        raise UserError(
            f"samples have {flat.shape[1]} values but the k-means centers {centers.shape[1]}; both must be one image size"
        )
    distances = [np.square(255.0 * row.astype(np.float64) - centers).sum(axis=1) for row in flat]
    return np.argmin(np.stack(distances), axis=1) if distances else np.zeros(0, np.int64)


def success_rate(samples: np.ndarray, centers: np.ndarray) -> float:
    """Returns 1.0 if all samples `[N, H, W, C]` in [0, 1] fall into cluster 0, else 0.0 (equation 2). Raises for no samples."""
    check(len(samples) > 0, "success_rate needs at least one sample")
    return float(np.all(clusters(samples, centers) == 0))
