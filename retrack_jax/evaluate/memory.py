"""What a model still knows of the forgotten images: its loss on them, membership, relearning, the forgotten class.

The retrained model is the measure of each. A lower loss than its own remembers; a much higher one marks the image, which is no
better than remembering it.
"""

from collections.abc import Sequence

import numpy as np

from retrack_jax.checks import Diverged
from retrack_jax.evaluate.finetune import SEED
from retrack_jax.evaluate.task import Subject, Task
from retrack_jax.metrics.membership import INTERVAL, T_SEC, denoising_losses, loss_scores, membership_auc, secmi_scores
from retrack_jax.metrics.relearning import relearning_curve, relearning_steps

# An image is back when the loss on it is at most this many times the loss of the model before unlearning.
BACK = 2.0


def forget_loss(task: Task, subject: Subject, wanted: Sequence[str]):
    """The denoising loss on the forgotten images, mean over 256 noises and all of them, in squared units summed over pixels."""
    found = _losses(task, subject.params, desc="forget_loss")
    note = {"num_images": len(found), "num_noises": found.shape[1], "noises": "the same for every model: differences are paired"}
    return {"forget_loss": float(found.mean())}, note


def label_share(task: Task, subject: Subject, wanted: Sequence[str]):
    """The share of samples that the task's classifier, else its feature network, takes for the forgotten label."""
    if task.label is None:
        return {}, {"why": "the target is not the whole of one label"}
    network = task.features() if task.classifier is None else task.classifier(False)
    if task.label >= network.num_labels:
        known = f"the labels 0 to {network.num_labels - 1}" if network.num_labels else "classes that are not the data's labels"
        return {}, {"why": f"the target has label {task.label}, and {network.name} knows {known}"}
    taken = np.argmax(network(subject.samples, "label_share")["logits"], axis=1)
    note = {"label": task.label, "num_samples": len(taken), "features": network.description, "features_digest": network.digest}
    return {"label_share": float(np.mean(taken == task.label))}, note


def membership(task: Task, subject: Subject, wanted: Sequence[str]):
    """The AUC of two attacks that tell forgotten from held-out images, each with its 95% bootstrap interval."""
    if task.held_out is None:
        return {}, {"why": "it needs a random:SHARE target, and images that no model saw (config.data.held_out)"}
    sides = task.clean(), task.held_out()
    conditions = task.condition, task.held_out_condition
    model = task.eps_fn, subject.params, task.schedule
    attacks = {
        # Each side's noise is drawn by its own image numbers, so the two share draws; that only pairs them.
        "membership_auc": lambda images, **how: loss_scores(*model, images, task.rng, **how),
        "membership_auc_secmi": lambda images, **how: secmi_scores(*model, images, **how),
    }
    values, note = {}, {"forgotten": len(sides[0]), "held_out": len(sides[1])}
    last = task.schedule.num_train_timesteps - 1
    for name in wanted:
        if name == "membership_auc_secmi" and last < T_SEC + INTERVAL:
            note["why"] = f"SecMI goes up to t = {T_SEC + INTERVAL}, and this model's schedule ends at {last}"
            continue
        scores = (attacks[name](images, desc=name, conditions=those) for images, those in zip(sides, conditions, strict=True))
        found = membership_auc(*scores, seed=0)
        values[name] = found.value
        note[f"{name}_95"] = [found.low, found.high]
    return values, note


def relearning(task: Task, subject: Subject, wanted: Sequence[str]):
    """Steps of fine-tuning until the loss on the forgotten images is at most `BACK` times the pretrained model's.

    On the remaining images alone (`relearning_steps_remain`) and on these plus one copy of each forgotten image
    (`relearning_steps`). A curve that never gets there counts its last step and is marked as censored; one whose fine-tuning
    diverges leaves its metric without a value.
    """
    num_noises = enough_noises(len(task.forgotten))

    def loss(params) -> float:
        return float(_losses(task, params, num_noises).mean())

    threshold = BACK * loss(task.pretrained())
    values, note = {}, {"measured": f"forget_loss under {num_noises} noises", "threshold": threshold, "seed": SEED}
    for name in wanted:
        state, train = task.finetune(subject.params, name == "relearning_steps")
        try:
            steps, losses = relearning_curve(train, lambda state: loss(state.params), state, task.relearning)
        except Diverged as error:
            note["why"] = str(error)
            continue
        values[name], censored = relearning_steps(steps, losses, threshold)
        note[name] = {"steps": steps, "values": losses, "censored": censored}
    return values, note


def enough_noises(num_images: int) -> int:
    """Returns how many noises an image needs along a curve of losses: 256, and fewer in a group, whose images average them."""
    return min(256, max(16, 4096 // num_images))


def _losses(task: Task, params, num_noises: int = 256, desc: str = "") -> np.ndarray:
    images = task.clean()
    how = {"num_noises": num_noises, "conditions": task.condition, "desc": desc}
    return denoising_losses(task.eps_fn, params, task.schedule, images, task.rng, **how)
