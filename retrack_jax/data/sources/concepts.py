"""Concepts: for each, a folder of pictures that a text-to-image model draws for one prompt, sorted into memorised and not; and
two prompts: the original, which reproduces the memorised picture, and the modified, which describes it in other words, and which
training conditions on.

CONCEPT/images/*.png            all pictures
CONCEPT/kmeans_labels.json      file name -> 1 memorised (to forget), 0 not (to remain)
CONCEPT/clustering_info.json    {"mem_idx": 12, ...}: images/CONCEPT_012.png is memorised, SSCD compares with it
CONCEPT/kmeans_classifier.joblib
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check, suggestion
from retrack_jax.data.cache import decoded_images, file_key
from retrack_jax.data.commands import hub, kaggle_folder
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement, if_file, matching, requirement
from retrack_jax.data.sources.source import Source, decode_options
from retrack_jax.data.target_names import target_specs
from retrack_jax.files import json_digest, read_object

logger = logging.getLogger(__name__)
LABELS, INFO, CLASSIFIER = "kmeans_labels.json", "clustering_info.json", "kmeans_classifier.joblib"
REMAIN, FORGET = 0, 1
KINDS = ("original", "modified")  # of prompts; metrics and arrays of samples are named by these
_PROMPT_FILES = ("original_prompts", "modified_prompts")


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept's pictures and prompts.

    Attributes:
      images: its labeled pictures, uint8 RGB of one size, in the order of the labels file; labels are 0 and 1.
      memorised: the memorised picture, uint8 `[H, W, 3]`.
      memorised_name: its file name.
      prompts: its two prompts, by kind.
    """

    name: str
    folder: Path
    images: ImageSet
    memorised: np.ndarray
    memorised_name: str
    prompts: dict[str, str]

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
      UserError: there is no such file, a label is neither 0 nor 1, a labeled picture does not exist, or one label has no
        picture.
    """
    folder = Path(folder)
    path = folder / LABELS
    check(path.is_file(), f"no {LABELS} in {folder}; it says which pictures are memorised (1) and which are not (0)")
    labels = read_object(path)
    whole = all(type(label) is int and label in (0, 1) for label in labels.values())
    check(whole, f"{path} must hold a JSON object of file name: 0 or 1")
    pictures = {path.name for path in (folder / "images").glob("*") if path.is_file()}
    missing = [name for name in labels if name not in pictures]
    if missing:
        raise UserError(
            f"{path} labels {len(missing)} of {len(labels)} pictures that are not in {folder / 'images'}, such as {missing[0]}; "
            "restore the pictures, or remove them from the file"
        )
    check(FORGET in labels.values(), f"{path}: no picture is memorised (label 1), so there is nothing to forget")
    check(REMAIN in labels.values(), f"{path}: no picture is unlike it (label 0) to remain")
    return labels


def memorised_name(folder, name: str) -> str:
    """Returns the file name of the concept's memorised picture, from `mem_idx`. Raises `UserError` if it is not there."""
    folder = Path(folder)
    path = folder / INFO
    check(path.is_file(), f"no {INFO} in {folder}; its mem_idx names the memorised picture")
    index = read_object(path).get("mem_idx")
    check(type(index) is int and index >= 0, f"{path}: mem_idx is {index!r}; it must be the number of the memorised picture")
    picture = f"{name}_{index:03d}.png"
    check(
        os.path.isfile(folder / "images" / picture),  # False for a name that is too long
        f"no memorised picture {folder / 'images' / picture}, which mem_idx in {path} names",
    )
    return picture


def load_concept(data: Mapping, name: str) -> Concept:
    """Returns the concept `name`, its pictures decoded once into the cache.

    Args:
      data: the fields of `config.data`: `dir`, the folder that holds one folder per concept; `resolution`, the side in pixels
        that pictures must have, or are brought to (0: as they are); `cache_dir`; `original_prompts` and `modified_prompts`.

    Raises:
      UserError: there is no such concept; its labels are missing or do not fit its pictures; there is no memorised picture, or
        it is labeled to remain; a picture cannot be decoded; a prompt is missing.
    """
    root = Path(data["dir"]).expanduser()
    folder = root / name
    if not (folder / "images").is_dir():
        raise UserError(f"no concept {name!r} in {root}{suggestion(name, list_concepts(root))}; looked for {folder / 'images'}")
    labels = read_labels(folder)
    memorised = memorised_name(folder, name)
    if labels.get(memorised) == REMAIN:
        raise UserError(
            f"{folder / INFO} names {memorised} as the memorised picture and {folder / LABELS} labels it 0, to remain: it would "
            "be trained to stay; correct one of them"
        )
    unlabeled = sum(file.is_file() and file.name not in labels for file in (folder / "images").iterdir())
    if unlabeled:
        logger.info("%s: %d pictures without a label in %s are left out", name, unlabeled, folder / "images")
    options = decode_options(data | {"channels": 3, "skip_corrupt": False})

    def load(title: str, names: list[str], values) -> ImageSet:
        key = json_digest([[file_key(folder / "images" / image, image) for image in names], values])
        return decoded_images(
            title,
            lambda: ((image, folder / "images" / image) for image in names),
            len(names),
            options,
            cache_dir=data["cache_dir"],
            source_key=["concept", key],
            labels=None if values is None else (lambda: values),
        )

    images = load(name, list(labels), list(labels.values()))
    if memorised in labels:
        picture = images.images[list(images.ids).index(memorised)]
    else:
        picture = load(f"{name} (memorised)", [memorised], None).images[0]
    return Concept(name, folder, images, np.asarray(picture), memorised, prompts_of(name, *_prompt_paths(data).values()))


def prompts_of(concept: str, original_path, modified_path) -> dict[str, str]:
    """Returns the prompts of one concept by kind, in the order of `KINDS`.

    Raises:
      UserError: a file lacks the concept; the message names it, and the nearest name in it.
    """
    found = {}
    for kind, path in zip(KINDS, (original_path, modified_path), strict=True):
        prompts = _read_prompts(path)
        if concept not in prompts:
            raise UserError(f"no {kind} prompt for the concept {concept!r} in {path}{suggestion(concept, prompts)}")
        found[kind] = prompts[concept]
    return found


def _read_prompts(path) -> Mapping[str, str]:
    path = Path(path).expanduser()
    check(path.is_file(), f"no file {path}; it holds a prompt for each concept (original_prompts.json, modified_prompts.json)")
    prompts = read_object(path)
    whole = all(isinstance(prompt, str) for prompt in prompts.values())
    check(whole, f"{path} must hold a JSON object of concept: prompt, all strings")
    return prompts


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
    load=lambda data: partial(load_concept, data),
    needs=_needs,
    checkpoint_command=lambda folder: hub(f"CompVis/stable-diffusion-v1-4 {' '.join(_MODEL_FILES)}", folder),
    gives_concepts=True,
    reads=("dir",),
)
