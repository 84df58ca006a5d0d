"""What each metric is called, how it is written, which way is better, and what it means: one table for every report.

Names are those of `metrics.json`. A name that is not here is shown as it is, with no direction claimed. The suffixes `_original`
and `_modified` are Stable Diffusion's two prompts.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one metric is shown.

    Attributes:
      name: the key in `metrics.json`.
      label: the heading in tables.
      better: "lower", "higher", or "" if only the distance to `retrain` says anything.
      about: "forgetting" (how well the image is gone), "quality" (how good all else still is) or "".
      style: "percent" (a share in [0, 1] shown in %), "number" or "count".
      digits: digits after the point.
      meaning: one sentence for a person who has not read the paper.
    """

    name: str
    label: str
    better: str = ""
    about: str = ""
    style: str = "number"
    digits: int = 3
    meaning: str = ""

    def text(self, value) -> str:
        """Returns `value` as it is printed: `4.80%`, `12.31`; a dash for None."""
        if value is None:
            return "–"
        if not isinstance(value, (int, float)):
            return str(value)
        if self.style == "percent":
            return f"{100 * value:.{self.digits}f}%"
        if self.style == "count":
            return f"{value:,.0f}"
        # Thousands (a diverged FID) need no decimals, and a tiny KID needs more than its share.
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{self.digits}f}"

    def spread(self, mean, std) -> str:
        """Returns `12.31 ± 0.20`, without the second half where `std` is None (a single run has no spread)."""
        if mean is None or std is None:
            return self.text(mean)
        if self.style == "percent":
            return f"{100 * mean:.{self.digits}f} ± {100 * std:.{self.digits}f}%"
        return f"{self.text(mean)} ± {self.text(std)}"


_METRICS = (
    Metric(
        name="frequency",
        label="Frequency",
        better="lower",
        about="forgetting",
        style="percent",
        digits=2,
        meaning="Share of samples that are the forgotten image, by distance in pixels. “0 (< b)”: no sample is, so the true "
        "share is below b with 95% confidence.",
    ),
    Metric(
        name="label_frequency",
        label="Frequency under its label",
        better="lower",
        about="forgetting",
        style="percent",
        digits=2,
        meaning="The same share among samples that were drawn under a forgotten image's own label.",
    ),
    Metric(
        name="fid",
        label="FID",
        better="lower",
        about="quality",
        digits=2,
        meaning="Fréchet distance between the features of samples and of the reference images.",
    ),
    Metric(
        name="kid",
        label="KID",
        better="lower",
        about="quality",
        digits=4,
        meaning="Kernel distance between the same features; unbiased for few samples.",
    ),
    Metric(
        name="inception_score",
        label="Inception score",
        better="higher",
        about="quality",
        digits=2,
        meaning="Samples that are each clearly of one class, and of many classes together, score high.",
    ),
    Metric(
        name="inception_score_official",
        label="Inception score (official)",
        better="higher",
        about="quality",
        digits=2,
        meaning="As the official code computes it, its network in training mode; depends on the batch.",
    ),
    Metric(
        name="precision",
        label="Precision",
        better="higher",
        about="quality",
        meaning="Share of samples that lie among the reference images.",
    ),
    Metric(
        name="recall",
        label="Recall",
        better="higher",
        about="quality",
        meaning="Share of reference images that lie among the samples.",
    ),
    Metric(
        name="forget_loss",
        label="Loss on forgotten",
        about="forgetting",
        meaning="Denoising loss on the forgotten images under the same noises for every model; retrain is the measure.",
        digits=2,
    ),
    Metric(
        name="nll_bits_per_dim",
        label="NLL (bits/dim)",
        better="higher",
        about="forgetting",
        meaning="Negative log-likelihood of the forgotten image; higher means the model finds it less likely.",
    ),
    Metric(
        name="sscd",
        label="SSCD",
        better="lower",
        about="forgetting",
        meaning="Copy-detection similarity between the forgotten image and what the model restores from a noised copy of it.",
    ),
    Metric(
        name="sscd_norm",
        label="SSCD, normalized",
        better="lower",
        about="forgetting",
        meaning="SSCD after the difference from the forgotten image is scaled to one size: only its direction counts.",
    ),
    Metric(
        name="clip_iqa",
        label="CLIP-IQA",
        better="higher",
        about="quality",
        meaning="Image quality judged by CLIP between “Good photo.” and “Bad photo.”.",
    ),
    Metric(
        name="success_rate",
        label="Success rate",
        better="higher",
        about="forgetting",
        style="percent",
        digits=1,
        meaning="Share of prompts for which no sample falls among the memorized ones.",
    ),
    Metric(
        name="membership_auc",
        label="Membership AUC",
        meaning="How well an attack by the loss tells forgotten from held-out images; 0.5 is chance, and retrain is the measure.",
    ),
    Metric(
        name="membership_auc_secmi",
        label="Membership AUC (SecMI)",
        meaning="The same for an attack by the error of a DDIM step there and back.",
    ),
    Metric(
        name="label_share",
        label="Label share",
        better="lower",
        about="forgetting",
        style="percent",
        digits=2,
        meaning="Share of samples that the classifier takes for the forgotten label.",
    ),
    Metric(
        name="relearning_steps",
        label="Relearning steps",
        style="count",
        meaning="Steps of fine-tuning on the remaining images and one copy of each forgotten one, until the loss on the "
        "forgotten is at most twice the pretrained model's; a curve that never gets there counts its last step.",
    ),
    Metric(
        name="relearning_steps_remain",
        label="Relearning steps, R only",
        style="count",
        meaning="The same on the remaining images alone.",
    ),
)
METRICS = {metric.name: metric for metric in _METRICS}
# With prompts, SSCD looks at the samples: nothing is restored.
_PROMPT_MEANINGS = {"sscd": "Copy-detection similarity of the picture of a prompt and the samples of the prompt, their mean."}
_PROMPTS = {
    "_original": "original prompt",
    "_modified": "modified prompt",
    "_forgotten": "forgotten captions",
    "_kept": "kept captions",
}

METHODS = {
    "pretrained": ("Pretrained", "The model before unlearning."),
    "retrain": ("Retrain", "Trained from scratch without the forgotten data: the gold standard."),
    "retrack": ("ReTrack", "Redirects the denoising trajectory toward the nearest remaining images."),
    "siss": ("SISS", "Subtracted importance-sampled scores, one mixture forward."),
    "siss_no_is": ("SISS, no IS", "SISS without importance sampling: two forwards."),
    "erasediff": ("EraseDiff", "Pushes the forgotten data's noise prediction to uniform noise, constrained by the remain loss."),
    "neggrad": ("NegGrad", "Gradient ascent on the forgotten data."),
    "vanilla": ("Vanilla", "Fine-tuning on the remaining data."),
}


def describe(name: str) -> Metric:
    """Returns how to show the metric `name`; an unknown one is shown under its own name, with no direction."""
    if name in METRICS:
        return METRICS[name]
    for suffix, prompt in _PROMPTS.items():
        base = METRICS.get(name.removesuffix(suffix))
        if name.endswith(suffix) and base:
            meaning = _PROMPT_MEANINGS.get(base.name, base.meaning)
            if name == "sscd_kept":  # samples that differ from their picture may be as good
                base = Metric(**{**vars(base), "better": "", "about": ""})
            return Metric(**{**vars(base), "name": name, "label": f"{base.label}, {prompt}", "meaning": meaning})
    return Metric(name=name, label=name.replace("_", " ").capitalize())


def order(names) -> list[str]:
    """Returns metric `names` without duplicates, the catalogue's first and in its order, then the rest in theirs."""
    names = list(dict.fromkeys(names))
    known = list(METRICS)

    def key(name):
        base = next((name.removesuffix(suffix) for suffix in _PROMPTS if name.endswith(suffix)), name)
        return known.index(base) if base in known else len(known)

    return sorted(names, key=key)


def method_label(method: str) -> str:
    """Returns how a method is written in prose: `retrack` is ReTrack."""
    return METHODS.get(method, (method,))[0]
