"""What each metric is called, how it is written, which way is better, and what it means: one table for every report.

Names are those of `metrics.json`. A name that is not here is shown as it is, with no direction claimed. The suffixes `_original`
and `_modified` are Stable Diffusion's two prompts.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
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
      noise: the least change that a single run tells from chance, as a share of the value.
    """

    name: str
    label: str
    better: str = ""
    about: str = ""
    style: str = "number"
    digits: int = 3
    meaning: str = ""
    noise: float = 0.05

    def text(self, value) -> str:
        """Returns `value` as it is printed: `4.80%`, `12.31`; a dash for None."""
        if value is None:
            return "–"
        if not isinstance(value, (int, float)):
            return str(value)
        if self.style == "percent":
            return f"{100 * value:.{self._digits(value)}f}%"
        if self.style == "count":
            return f"{value:,.0f}"
        # Thousands (a diverged FID) need no decimals, and a tiny KID needs more than its share.
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{self.digits}f}"

    def spread(self, mean, std) -> str:
        """Returns `12.31 ± 0.20`, without the second half where `std` is None (a single run has no spread)."""
        if mean is None or std is None:
            return self.text(mean)
        if self.style == "percent":
            digits = self._digits(mean)
            return f"{100 * mean:.{digits}f} ± {100 * std:.{digits}f}%"
        return f"{self.text(mean)} ± {self.text(std)}"

    def _digits(self, share: float) -> int:
        """Digits of a percentage: two significant ones of a share so small that it would be shown as 0."""
        percent = 100 * abs(share)
        return 1 - math.floor(math.log10(percent)) if 0 < percent < 10**-self.digits else self.digits


# fmt: off
_METRICS = (
    Metric("frequency", "Frequency", "lower", "forgetting", "percent", 2,
           "Share of samples that are the forgotten image, by distance in pixels. “0 (< b)”: no sample is, so the true "
           "share is below b with 95% confidence."),
    Metric("label_frequency", "Frequency under its label", "lower", "forgetting", "percent", 2,
           "The same share among samples that were drawn under a forgotten image's own label."),
    Metric("fid", "FID", "lower", "quality", "number", 2,
           "Fréchet distance between the features of samples and of the reference images."),
    Metric("kid", "KID", "lower", "quality", "number", 4,
           "Kernel distance between the same features; unbiased for few samples."),
    Metric("inception_score", "Inception score", "higher", "quality", "number", 2,
           "Samples that are each clearly of one class, and of many classes together, score high."),
    Metric("inception_score_official", "Inception score (official)", "higher", "quality", "number", 2,
           "As the official code computes it, its network in training mode; depends on the batch."),
    Metric("precision", "Precision", "higher", "quality", "number", 3,
           "Share of samples that lie among the reference images."),
    Metric("recall", "Recall", "higher", "quality", "number", 3,
           "Share of reference images that lie among the samples."),
    Metric("forget_loss", "Loss on forgotten", "", "forgetting", "number", 2,
           "Denoising loss on the forgotten images under the same noises for every model; retrain is the measure."),
    Metric("nll_bits_per_dim", "NLL (bits/dim)", "higher", "forgetting", "number", 3,
           "Negative log-likelihood of the forgotten image; higher means the model finds it less likely.", noise=0.005),
    Metric("sscd", "SSCD", "lower", "forgetting", "number", 3,
           "Copy-detection similarity between the forgotten image and what the model restores from a noised copy of it."),
    Metric("sscd_norm", "SSCD, normalized", "lower", "forgetting", "number", 3,
           "SSCD after the difference from the forgotten image is scaled to one size: only its direction counts."),
    Metric("clip_iqa", "CLIP-IQA", "higher", "quality", "number", 3,
           "Image quality judged by CLIP between “Good photo.” and “Bad photo.”."),
    Metric("success_rate", "Success rate", "higher", "forgetting", "percent", 1,
           "Share of prompts for which no sample falls among the memorized ones."),
    Metric("membership_auc", "Membership AUC", "", "", "number", 3,
           "How well an attack by the loss tells forgotten from held-out images; 0.5 is chance, and retrain is the measure."),
    Metric("membership_auc_secmi", "Membership AUC (SecMI)", "", "", "number", 3,
           "The same for an attack by the error of a DDIM step there and back."),
    Metric("label_share", "Label share", "", "forgetting", "percent", 2,
           "Share of samples that the classifier takes for the forgotten label; retrain is the measure."),
    Metric("relearning_steps", "Relearning steps", "", "", "count", 3,
           "Steps of fine-tuning on the remaining images and one copy of each forgotten one, until the loss on the "
           "forgotten is at most twice the pretrained model's; “> n”: it was not back by then."),
    Metric("relearning_steps_remain", "Relearning steps, R only", "", "", "count", 3,
           "The same on the remaining images alone."),
)
# fmt: on
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
                base = replace(base, better="", about="")
            return replace(base, name=name, label=f"{base.label}, {prompt}", meaning=meaning)
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
