"""Concepts: for each, a folder of pictures that a text-to-image model draws for one prompt, sorted into memorised and not; and
the prompts of all of them (prompts.py).

CONCEPT/images/*.png            all pictures
CONCEPT/kmeans_labels.json      file name -> 1 memorised (to forget), 0 not (to remain)
CONCEPT/clustering_info.json    {"mem_idx": 12, ...}: images/CONCEPT_012.png is memorised, SSCD compares with it
CONCEPT/kmeans_classifier.joblib
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check, suggestion
from retrack_jax.data.cache import decoded_images, file_key
from retrack_jax.data.commands import hub, kaggle_folder
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.decode import DecodeOptions
from retrack_jax.data.needs import Requirement, if_file, matching, requirement
from retrack_jax.data.sources.prompts import PromptPair, prompts_of
from retrack_jax.data.sources.source import Source
from retrack_jax.data.target_names import target_specs
from retrack_jax.files import json_digest, read_json

logger = logging.getLogger(__name__)
LABELS, INFO, CLASSIFIER = "kmeans_labels.json", "clustering_info.json", "kmeans_classifier.joblib"
REMAIN, FORGET = 0, 1
_PROMPT_FILES = ("original_prompts", "modified_prompts")


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept's pictures and prompts.

    Attributes:
      name: the folder's name.
      folder: where it is.
      images: its labelled pictures, uint8 RGB of one size, in the order of the labels file; labels are 0 and 1.
      memorised: the memorised picture, uint8 `[H, W, 3]`.
      memorised_name: its file name.
      prompts: its two prompts; None if only the pictures were loaded.
      first_row: the number of its first picture among the pictures of all concepts that were asked for.
    """

    name: str
    folder: Path
    images: ImageSet
    memorised: np.ndarray
    memorised_name: str
    prompts: PromptPair | None = None
    first_row: int = 0

    @property
    def forget(self) -> np.ndarray:
        """Rows of the pictures to forget."""
        return np.flatnonzero(self.images.labels == FORGET)

    @property
    def remain(self) -> np.ndarray:
        """Rows of the pictures that remain."""
        return np.flatnonzero(self.images.labels == REMAIN)


def list_concepts(root) -> list[str]:
    """Returns the concepts below `root`, sorted: the folders with an `images` folder. Raises `UserError` if there are none."""
    root = Path(root).expanduser()
    check(root.is_dir(), f"no folder {root}; set config.data.dir to the folder that holds one folder per concept")
    names = sorted(folder.name for folder in root.iterdir() if (folder / "images").is_dir())
    check(len(names) > 0, f"no concept in {root} (a folder with an images folder in it); set config.data.dir")
    return names


def read_labels(folder) -> dict[str, int]:
    """Returns file name -> 0 or 1 from the concept's labels file.

    Raises:
      UserError: there is no such file, a label is neither 0 nor 1, a labelled picture does not exist, or one label has no
        picture.
    """
    folder = Path(folder)
    path = folder / LABELS
    check(path.is_file(), f"no {LABELS} in {folder}; it says which pictures are memorised (1) and which are not (0)")
    labels = read_json(path)
    whole = isinstance(labels, dict) and all(type(label) is int and label in (0, 1) for label in labels.values())
    check(whole, f"{path} must hold a JSON object of file name: 0 or 1")
    missing = [name for name in labels if not (folder / "images" / name).is_file()]
    if missing:
        raise UserError(
            f"{path} labels {len(missing)} of {len(labels)} pictures that are not in {folder / 'images'}, such as {missing[0]}; "
            "restore the pictures, or remove them from the file"
        )
    for label, meaning in (
        (FORGET, "memorised (label 1), so there is nothing to forget"),
        (REMAIN, "unlike it (label 0) to remain"),
    ):
        check(label in labels.values(), f"{path}: no picture is {meaning}")
    return labels


def memorised_name(folder, name: str) -> str:
    """Returns the file name of the concept's memorised picture, from `mem_idx`. Raises `UserError` if it is not there."""
    folder = Path(folder)
    path = folder / INFO
    check(path.is_file(), f"no {INFO} in {folder}; its mem_idx names the memorised picture")
    info = read_json(path)
    index = info.get("mem_idx") if isinstance(info, dict) else None
    check(type(index) is int and index >= 0, f"{path}: mem_idx is {index!r}; it must be the number of the memorised picture")
    picture = f"{name}_{index:03d}.png"
    check(
        (folder / "images" / picture).is_file(),
        f"no memorised picture {folder / 'images' / picture}, which mem_idx in {path} names",
    )
    return picture


def load_concept(root, name: str, *, resolution: int, cache_dir) -> Concept:
    """Returns the concept `name` below `root`, its pictures decoded once into the cache.

    Args:
      root: the folder that holds one folder per concept.
      resolution: side in pixels that pictures must have, or are brought to; 0 takes them as they are.
      cache_dir: where decoded pictures are kept.

    Raises:
      UserError: there is no such concept; its labels are missing or do not fit its pictures; there is no memorised picture, or
        it is labelled to remain; a picture cannot be decoded.
    """
    folder = Path(root).expanduser() / name
    if not (folder / "images").is_dir():
        raise UserError(f"no concept {name!r} in {root}{suggestion(name, list_concepts(root))}; looked for {folder / 'images'}")
    labels = read_labels(folder)
    memorised = memorised_name(folder, name)
    if labels.get(memorised) == REMAIN:
        raise UserError(
            f"{folder / INFO} names {memorised} as the memorised picture and {folder / LABELS} labels it 0, to remain: it would "
            "be trained to stay; correct one of them"
        )
    unlabelled = sum(file.is_file() and file.name not in labels for file in (folder / "images").iterdir())
    if unlabelled:
        logger.info("%s: %d pictures without a label in %s are left out", name, unlabelled, folder / "images")
    options = DecodeOptions(resolution=resolution, channels=3)

    def load(title: str, names: list[str], values) -> ImageSet:
        key = json_digest([[file_key(folder / "images" / image, image) for image in names], values])
        return decoded_images(
            title,
            lambda: ((image, folder / "images" / image) for image in names),
            len(names),
            options,
            cache_dir=cache_dir,
            source_key=["concept", key],
            labels=None if values is None else (lambda: values),
        )

    images = load(name, list(labels), list(labels.values()))
    if memorised in labels:
        picture = images.images[list(images.ids).index(memorised)]
    else:
        picture = load(f"{name} (memorised)", [memorised], None).images[0]
    return Concept(name, folder, images, np.asarray(picture), memorised)


class Concepts:
    """The concepts that `data`, the fields of `config.data`, describes, each loaded at its first use.

    Rows number the pictures of all concepts in the order in which the concepts were first asked for, so that a row identifies its
    concept.
    """

    def __init__(self, data: Mapping):
        self._data, self._loaded = data, {}

    def __getitem__(self, name: str) -> Concept:
        """Raises `UserError` for a concept that does not exist, or lacks a file or a prompt (see `load_concept`)."""
        if name not in self._loaded:
            data = self._data
            concept = load_concept(data["dir"], name, resolution=data.get("resolution", 0), cache_dir=data["cache_dir"])
            first_row = sum(len(other.images) for other in self._loaded.values())
            prompts = prompts_of(name, *_prompt_paths(data).values())
            self._loaded[name] = dataclasses.replace(concept, prompts=prompts, first_row=first_row)
        return self._loaded[name]

    def of(self, rows: np.ndarray) -> Concept:
        """Returns the loaded concept that all of `rows`, int `[R]` with R at least 1, belong to."""
        for concept in self._loaded.values():
            if concept.first_row <= rows[0] < concept.first_row + len(concept.images):
                return concept
        raise ValueError(f"row {rows[0]} belongs to no concept")


def _prompt_paths(data: Mapping) -> dict[str, Path]:
    """Field -> the JSON file of prompts that it names, relative to `dir` or absolute."""
    folder = Path(data["dir"]).expanduser()
    return {field: folder / Path(data.get(field) or f"{field}.json").expanduser() for field in _PROMPT_FILES}


def _needs(data: Mapping, config: Mapping) -> Iterator[Requirement]:
    folder, evaluation = Path(data["dir"]).expanduser(), config["eval"]
    command = kaggle_folder("datasets", "data/datasets/sd", folder, *(f"data/datasets/{field}.json" for field in _PROMPT_FILES))
    for field, path in _prompt_paths(data).items():
        yield requirement(field.replace("_", " "), path, if_file(path), command=command)
    scored = any(metric.startswith("success_rate") for metric in evaluation["metrics"])
    for name in target_specs(config["targets"]):
        pictures = matching(folder / name, "images/*")
        parts = [if_file(folder / name / file) for file in (LABELS, INFO)]
        found = sorted(pictures + sum(parts, [])) if pictures and all(parts) else []
        yield requirement(f"concept {name}", folder / name, found, command=command)
        if scored and evaluation.get("classifier") == "joblib":
            path = folder / name / CLASSIFIER
            without = "success_rate is left out, or refitted with config.eval.classifier=labels"
            yield requirement(f"classifier of {name}", path, if_file(path), command=command, without=without)


# What is read of CompVis/stable-diffusion-v1-4: a third of it, since it holds each network up to five times.
_MODEL_FILES = (
    "README.md",
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
SOURCE = Source(
    formats=("concepts",),
    load=Concepts,
    needs=_needs,
    checkpoint_command=lambda folder: hub(f"CompVis/stable-diffusion-v1-4 {' '.join(_MODEL_FILES)}", folder),
    has_recipe=False,
    gives_concepts=True,
)
