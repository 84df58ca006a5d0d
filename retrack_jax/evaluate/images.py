"""The metrics of image models: which there are, and how samples, references and networks meet in each.

One `Evaluator` a family; adding a metric is one function and one row of `EVALUATORS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.diffusion.schedule import LEARNED_VARIANCE
from retrack_jax.evaluate.finetune import SEED
from retrack_jax.evaluate.memory import forget_loss, label_share, membership, relearning
from retrack_jax.evaluate.restored import INJECTED_T, keep_pictures, restore
from retrack_jax.evaluate.results import Evaluator
from retrack_jax.evaluate.task import Subject, Task
from retrack_jax.metrics.feature_metrics import FEATURE_METRICS, cached_feature_stats, evaluate_features, feature_stats, too_few
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.metrics.frequency import frequency_upper_bound, target_distances
from retrack_jax.metrics.inception_score import NUM_SPLITS, OFFICIAL, few_samples_note, inception_score
from retrack_jax.metrics.likelihood import nll_bits_per_dim
from retrack_jax.metrics.sscd import sscd, sscd_norm

_UNDER = " under labels drawn from forgotten images"


def forgotten_samples(task: Task, subject: Subject) -> np.ndarray:
    """Returns bool `[N]`: which samples are a forgotten image; none where the task has no threshold."""
    if not task.threshold:
        return np.zeros(len(subject.samples), bool)
    return target_distances(subject.finest, task.forgotten) < task.threshold


def other_samples(task: Task, subject: Subject) -> tuple[np.ndarray, str]:
    """Returns bool `[N]`, which samples are measured for their quality, and in words which are left out."""
    forgotten = forgotten_samples(task, subject)
    left_out = f"{forgotten.sum()} samples that are the forgotten image" if task.threshold else "none: no threshold says which"
    if task.of_forgotten is None:
        return ~forgotten, left_out
    under = np.resize(task.of_forgotten, len(forgotten))
    return ~(forgotten | under), f"{left_out}; {under.sum()}{_UNDER}"


def _frequency(task: Task, subject: Subject, wanted: Sequence[str]):
    if not task.threshold:
        return {}, {
            "why": "config.eval.frequency_threshold is 0: no sample counts as the forgotten image; set it, in another --workdir"
        }
    hits = forgotten_samples(task, subject)
    note = {
        "num_samples": len(hits),
        "hits": int(hits.sum()),
        "upper_bound_95": frequency_upper_bound(int(hits.sum()), len(hits)),
        "threshold": task.threshold,
        "samples": "uint8" if subject.samples_float is None else "float32",
    }
    return {"frequency": float(hits.mean())}, note


def _label_frequency(task: Task, subject: Subject, wanted: Sequence[str]):
    if subject.labels is None:
        return {}, {"why": "the network takes no labels"}
    mine = np.isin(subject.labels, task.condition)
    if not mine.any():
        advice = "add it to config.sampling.labels, in another --workdir"
        return {}, {"why": f"no sample is under the label of a forgotten image; {advice}"}
    floats = None if subject.samples_float is None else subject.samples_float[mine]
    under = dataclasses.replace(subject, samples=subject.samples[mine], samples_float=floats)
    values, note = _frequency(task, under, wanted)
    labels = np.unique(task.condition).tolist()
    return ({"label_frequency": values["frequency"]} if values else {}), note | {"labels": labels}


def _features(task: Task, subject: Subject, wanted: Sequence[str]):
    others, left_out = other_samples(task, subject)
    kept = subject.samples[others]
    few = too_few(wanted, len(kept), len(task.reference))
    wanted = [name for name in wanted if name not in few]
    why = {"why": "; ".join(few.values()) + f" (left out: {left_out})"} if few else {}
    if not wanted:
        return {}, why
    network = task.features()
    reference = cached_feature_stats(network, task.reference, task.reference_digest, task.cache_dir, desc="features: reference")
    values, note = evaluate_features(feature_stats(network, kept, "features: samples"), reference, wanted)
    about = {"features_digest": network.digest, "reference": task.reference_name}
    return values, {**note, **about, **why, "left_out": left_out}


def _nll(task: Task, subject: Subject, wanted: Sequence[str]):
    if task.decode is not None:
        return {}, {"why": "it is the likelihood of pixels, and this model's network denoises latents"}
    images = task.clean()
    try:
        bits, stderr = nll_bits_per_dim(
            task.eps_fn, subject.params, task.schedule, images, task.protocol_rng,
            num_probes=task.nll_probes, conditions=task.condition, desc="nll_bits_per_dim",
        )  # fmt: skip
    except UserError as reason:  # another schedule, or an ODE that cannot be solved: the other metrics have a value all the same
        return {}, {"why": str(reason)}
    mode = "flow" if task.schedule.is_flow else "edm" if task.schedule.is_edm else "official"
    note = {"num_images": len(bits), "num_probes": task.nll_probes, "mode": mode}
    if stderr is not None:
        note["stderr"] = float(np.sqrt(np.square(stderr).sum()) / len(bits))
    return {"nll_bits_per_dim": float(np.mean(bits))}, note


def _class_score(name: str, task: Task, subject: Subject, wanted: Sequence[str]):
    others, left_out = other_samples(task, subject)
    values, note = class_score(name, task.classifier, subject.finest[others])
    return values, {**note, "left_out": left_out}


def class_score(name: str, load: Callable[[bool], FeatureNetwork], samples: np.ndarray) -> tuple[dict[str, float], dict]:
    """Returns `{name: score}` by a classifier of the data's own classes, in [1, their number], and the note for provenance; no
    value if there are too few samples.

    Args:
      name: `inception_score`, or `inception_score_official`, for which the classifier normalizes by the statistics of each batch
        of 256, the official size, so that the number depends on the batch and on the order of the samples.
      load: `official -> FeatureNetwork` with logits; raises `Unavailable` without its weights.
      samples: `[N, H, W, C]` without the forgotten image: uint8, or floats in [0, 1], as the official code has them.
    """
    if len(samples) < NUM_SPLITS:
        return {}, {"why": f"{NUM_SPLITS} splits need as many samples; {len(samples)} are left"}
    official = name == OFFICIAL
    network = load(official)
    score = inception_score(network(samples, name)["logits"], seed=0, num_splits=NUM_SPLITS, official=official)
    note = {
        "features": network.description,
        "features_digest": network.digest,
        "num_samples": len(samples),
        "samples": str(samples.dtype),
        f"{name}_std": score.std,
        "splits": score.num_splits,
        **few_samples_note(score, len(samples)),
    }
    if official:
        note["batch_dependent"] = f"normalized by the statistics of each batch of {network.batch_size} samples, in their order"
    return {name: score.mean}, note


def _sscd(task: Task, subject: Subject, wanted: Sequence[str]):
    if not task.schedule.has_betas or task.schedule.variance_type == LEARNED_VARIANCE:
        return {}, {"why": "its protocol samples with the variance of the schedule's betas, which this model has not"}
    if (last := task.schedule.num_train_timesteps - 1) < INJECTED_T:
        return {}, {"why": f"its protocol restores images noised to t = {INJECTED_T}, and this model's schedule ends at {last}"}
    network = task.sscd()
    how = task.protocol_rng, task.condition, task.decode
    given, made = restore(task.eps_fn, subject.params, task.schedule, task.clean(), *how)
    scores = {"sscd": sscd(network, made, task.forgotten)}
    if "sscd_norm" in wanted:
        scores["sscd_norm"] = sscd_norm(network, made, task.forgotten)
    if subject.pictures is not None:
        keep_pictures(subject.pictures, task.forgotten, given, made, scores["sscd"])
    note = {"features": network.description, "features_digest": network.digest, "num_images": len(made)}
    note |= {"injected_at_t": INJECTED_T, "sampler": "ddpm, full schedule"}
    return {name: float(np.mean(scores[name])) for name in wanted}, note


def _leaves_out_the_same(task: Task, note: dict) -> bool:
    """Whether a value is of samples whose labels are as frequent as in the reference, which earlier versions did not see to."""
    return task.of_forgotten is None or _UNDER in note.get("left_out", "")


EVALUATORS = [
    Evaluator(names=("frequency",), compute=_frequency),
    Evaluator(names=("label_frequency",), compute=_label_frequency),
    Evaluator(names=FEATURE_METRICS, compute=_features, is_current=_leaves_out_the_same),
    Evaluator(names=("nll_bits_per_dim",), compute=_nll),
    Evaluator(names=("forget_loss",), compute=forget_loss),
    Evaluator(names=("label_share",), compute=label_share),
    Evaluator(names=("membership_auc", "membership_auc_secmi"), compute=membership),
    Evaluator(
        names=("relearning_steps", "relearning_steps_remain"),
        compute=relearning,
        is_current=lambda task, note: note.get("seed") == SEED,  # earlier versions had draws that a run was trained with
    ),
    Evaluator(names=("sscd", "sscd_norm"), compute=_sscd),
]
_CLASS_SCORES = ("inception_score", OFFICIAL)


def metric_names() -> tuple[str, ...]:
    """Returns every metric of images that can be asked for."""
    return (*(name for evaluator in EVALUATORS for name in evaluator.names), OFFICIAL)


def evaluators(task: Task) -> Sequence[Evaluator]:
    """Returns `EVALUATORS`; for a task with a classifier the inception scores are that one's, and not of `task.features`."""
    if task.classifier is None:
        return EVALUATORS
    others = tuple(name for name in FEATURE_METRICS if name not in _CLASS_SCORES)
    kept = [dataclasses.replace(one, names=others) if one.compute is _features else one for one in EVALUATORS]
    how = {"is_current": _leaves_out_the_same}
    return (*kept, *(Evaluator(names=(name,), compute=functools.partial(_class_score, name), **how) for name in _CLASS_SCORES))
