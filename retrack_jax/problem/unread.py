"""Fields that only images, or networks of one condition, have a use for, so that others refuse them."""

from operator import attrgetter

from retrack_jax.checks import check
from retrack_jax.config.options import Options

_FIELDS = {
    "images": ("data.format", "data.channels", "data.held_out", "data.exclude", "data.skip_corrupt"),
    "captions": ("data.caption_dropout", "sampling.num_captions"),
    "labels": ("data.null_label", "data.label_dropout", "data.label_vectors", "sampling.labels", "sampling.label_guidance"),
    "prompts": ("sampling.guidance_scale", "sampling.negative_prompt"),
}
_WHY = {
    "images": "concepts have no use for it",
    "captions": "only images with captions of their own have a use for it",
    "labels": "the network takes no class labels and has no use for it",
    "prompts": "the network takes no prompts and has no use for it (of labels it is label_guidance)",
}


def check_unread(options: Options, condition: str) -> None:
    """Raises `UserError` for fields that are set and that only problems of one kind read: images, captions, labels or prompts."""
    default = Options()
    fields = [f"config.{name}" for name in _FIELDS[condition] if attrgetter(name)(options) != attrgetter(name)(default)]
    for method in options.method_names:
        fields += [f"config.unlearn.{method}.{name}" for name in options.recipe(method).own.only_for(condition)]
    check(not fields, f"{', '.join(fields)}: {_WHY[condition]}; leave it out")
