"""What each result of a run is made from. Two results are the same run's if, and only if, these are equal.

Every folder of results keeps it in `config.json`, one section for each kind of result: `model`, `inputs`, `samples`,
`evaluation`. A section is written with its result and binds only that: a field that only sampling reads binds samples, and
another method's option binds nothing. What only costs memory or time is in none, so that a run continues on other devices.
"""

import dataclasses
import json

from retrack_jax.config.options import Options
from retrack_jax.unlearn.methods import METHODS, PRETRAINED

# Of config.pretrain, what fine-tuning for the relearning curves reads: a checkpoint's model does not depend on it.
_FINETUNING = ("b1", "b2", "eps", "weight_decay", "clip_norm", "logit_normal", "log_normal")

# Metrics can be added at any time, each result names its own classifier, and the rest is only shown.
_NOT_BINDING = {"metrics", "classifier", "weights_dir", "mark_name", "grid_images"}


def model_reads(options: Options, method: str) -> dict:
    """Returns the fields that a method's parameters depend on; those of `pretrained` are part of every other's."""
    fields = {
        "checkpoint": options.checkpoint,
        "pipeline": options.pipeline,
        "data": _fields(options.data, {"cache_dir", "dir", "encode_batch_size"}),
        "schedule": _fields(options.schedule),
        "compute": {"dtype": options.compute.dtype},
    }
    if not options.checkpoint or (method in METHODS and METHODS[method].from_scratch):
        fields |= {"model": _fields(options.new_network), "pretrain": _fields(options.pretrain, {"accumulation"})}
    if method != PRETRAINED:
        recipe = options.recipe(method)
        own = {} if METHODS[method].from_scratch else {method: _fields(recipe.own)}
        shared = {} if METHODS[method].from_scratch else _fields(recipe, {"accumulation", "own", "lora"})
        lora = options.lora(method)
        adapter = {} if lora is None else {"lora": _fields(lora, {"export"})}
        fields |= {"method": method, "unlearn": {**shared, **adapter, **own}}
    return json.loads(json.dumps(fields))


def sample_reads(options: Options) -> dict:
    """Returns the fields that samples depend on, in addition to the model."""
    compute = {"param_dtype": options.compute.param_dtype}
    fields = {"sampling": options.sampling.binding, "save_float": options.save_float, "compute": compute}
    return json.loads(json.dumps(fields))


def evaluation_reads(options: Options) -> dict:
    """Returns the fields that metrics depend on, in addition to the model and its samples."""
    fields = {"eval": _fields(options.eval, _NOT_BINDING)}
    if options.checkpoint:
        fields["pretrain"] = {name: getattr(options.pretrain, name) for name in _FINETUNING}
    return json.loads(json.dumps(fields))


def _fields(record, leave_out: set[str] = frozenset()) -> dict:
    return {name: value for name, value in dataclasses.asdict(record).items() if name not in leave_out}
