"""What a config needs of models: the checkpoint that it starts from, and the networks behind its metrics.

`weights.folder` says where weights lie, here as for their import.
"""

from collections.abc import Iterator
from pathlib import Path

from retrack_jax.checks import UserError
from retrack_jax.data.commands import KAGGLE, MNIST_FILE, WEIGHTS, curl, unzip_file
from retrack_jax.data.needs import METRICS_LEFT_OUT, Requirement, hub_need, if_file, requirement
from retrack_jax.data.sources.table import SOURCES
from retrack_jax.weights import hub
from retrack_jax.weights.folder import DIFFUSERS_WEIGHTS, NETWORK_FOLDERS, TRANSFORMERS_WEIGHTS, find_weights, schedule_places
from retrack_jax.weights.kinds import T5, autoencoder_folder, is_sd3, takes_prompts, text_encoders, tokenizer_of

_USES_INCEPTION = ("fid", "kid", "precision", "recall", "inception_score")
_CLASS_SCORES = ("inception_score", "inception_score_official")


def checkpoint_parts(checkpoint: str, source: str) -> Iterator[Requirement]:
    """Yields the parts of `config.checkpoint`; nothing where it is empty."""
    if not checkpoint:
        return
    if hub.is_id(checkpoint):
        yield hub_need("model", checkpoint, hub.model_files)
        return
    folder = Path(checkpoint).expanduser()
    if folder.is_file():
        yield requirement("checkpoint in one file", folder, [folder])
        return
    command, advice = SOURCES[source].checkpoint_command(folder), "set config.checkpoint to a folder that diffusers saved"
    how = {"command": command, "advice": advice}
    yield from _pipeline(folder, how) if SOURCES[source].gives_concepts or takes_prompts(folder) else _unet(folder, how)


def _unet(folder: Path, how: dict) -> Iterator[Requirement]:
    present = [part for part in (*NETWORK_FOLDERS, ".") if (folder / part / "config.json").is_file()]
    part = present[0] if present else "."
    yield from _network(folder, part, "model" if part == "." else part, DIFFUSERS_WEIGHTS, how)
    if not present:
        return
    if (coder := autoencoder_folder(folder)) is not None:
        yield from _network(coder.parent, coder.name, coder.name, DIFFUSERS_WEIGHTS, how)
    places = schedule_places(folder)
    there = [place for place in places if place.is_file()]
    # No command: a checkpoint may come without a schedule, as SISS's of MNIST does, and another download would not bring one.
    advice = "put the model's own scheduler_config.json there, unless config.schedule is what it was trained with"
    yield requirement("noise schedule", places[0], there[:1], advice=advice, without="config.schedule is taken")


def _pipeline(folder: Path, how: dict) -> Iterator[Requirement]:
    texts = text_encoders(folder)
    for part in ("transformer" if is_sd3(folder) else "unet", "vae", *texts):
        yield from _network(folder, part, part, TRANSFORMERS_WEIGHTS if part in texts else DIFFUSERS_WEIGHTS, how)
    for part in texts:
        tokenizer = folder / tokenizer_of(part)
        pair, whole = [tokenizer / name for name in ("vocab.json", "merges.txt")], tokenizer / "tokenizer.json"
        if part == T5 or (whole.is_file() and not all(path.is_file() for path in pair)):
            pair = [whole]
        for path in pair:
            yield requirement(tokenizer.name, path, if_file(path), **how)
    schedule = folder / "scheduler" / "scheduler_config.json"
    yield requirement("noise schedule", schedule, if_file(schedule), **how)


def _network(folder: Path, part: str, name: str, names: tuple[str, ...], how: dict) -> Iterator[Requirement]:
    config = folder / part / "config.json"
    yield requirement(f"{name} config", config, if_file(config), **how)
    try:
        files = find_weights(folder / part, names)
    except UserError as error:
        yield Requirement(description=f"{name} weights", path=folder / part, found=False, advice=str(error))
        return
    missing = next((file for file in files if not file.is_file()), None)
    yield requirement(f"{name} weights", missing or folder / part, [] if missing else files, **how)


def metric_networks(evaluation: dict) -> Iterator[Requirement]:
    """Yields the files of the networks behind `config.eval.metrics`."""
    folder = Path(evaluation["weights_dir"]).expanduser()
    metrics = set(evaluation["metrics"] or ())
    classifier = evaluation.get("score_network") == "mnist_resnet" and metrics & {*_CLASS_SCORES, "label_share"}
    by_features = metrics & set(_USES_INCEPTION) - (set(_CLASS_SCORES) if classifier else set())
    wanted = ["inception"] if evaluation.get("features") == "inception" and by_features else []
    wanted += ["sscd"] if any(metric.startswith("sscd") for metric in metrics) else []
    wanted += ["CLIP RN50"] if any(metric.startswith("clip_iqa") for metric in metrics) else []
    for network in wanted:
        names, address = WEIGHTS[network]
        path, found = folder / names[0], next((file for name in names if (file := if_file(folder / name))), [])
        command = curl(f"{address}/{names[0]}", path)
        yield requirement(f"feature network {network}", path, found, command=command, without=METRICS_LEFT_OUT)
    if classifier:
        command = unzip_file(f"{KAGGLE}-checkpoints", f"checkpoints/classifiers/{MNIST_FILE}", folder)
        path = folder / MNIST_FILE
        yield requirement("classifier MNIST ResNet-18", path, if_file(path), command=command, without=METRICS_LEFT_OUT)
