"""All sources of data by name. To add one, write a module that ends in its record and add that here."""

from retrack_jax.data.sources import celebahq, cifar10, concepts, digits, folder, idx, mnist5k, mnist_tshirt, npz, parquet, tfds
from retrack_jax.data.sources.source import Source

SOURCES: dict[str, Source] = {
    "digits_tshirt": digits.SOURCE,
    "mnist_tshirt": mnist_tshirt.SOURCE,
    "mnist5k_tshirt": mnist5k.SOURCE,
    "cifar10": cifar10.SOURCE,
    "celebahq": celebahq.SOURCE,
    "folder": folder.SOURCE,
    "parquet": parquet.SOURCE,
    "idx": idx.SOURCE,
    "npz": npz.SOURCE,
    "tfds": tfds.SOURCE,
    "concepts": concepts.SOURCE,
}
