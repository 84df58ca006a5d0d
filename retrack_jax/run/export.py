"""What a run leaves for others, in its folder `diffusers`: the network, the whole pipeline, a single file, or an adapter."""

from collections.abc import Mapping

from etils import epath

from retrack_jax import parallel
from retrack_jax.checkpoints.diffusers_export import LORA_WEIGHTS, is_whole
from retrack_jax.checks import check
from retrack_jax.config.options import Options
from retrack_jax.data.target_names import described
from retrack_jax.report.verdict import calibration_in_words, in_words
from retrack_jax.run import calibrate
from retrack_jax.run.context import Run, RunContext
from retrack_jax.run.training import Model
from retrack_jax.train.lora import ADAPTER
from retrack_jax.unlearn.methods import PRETRAINED
from retrack_jax.weights.folder import NETWORK_FOLDERS

# What each value of config.export, and an adapter, leaves that those after it do not.
_MARKS = {
    "pipeline": NETWORK_FOLDERS, "single_file": ["model.safetensors"], "unet": ["config.json"], ADAPTER: [LORA_WEIGHTS],
}  # fmt: skip


def check_export(options: Options, root) -> None:
    """Raises `UserError` if the config asks for an export that cannot be written below `root`, before anything is trained."""
    kinds = {_kind(options, method) for method in options.method_names if method != PRETRAINED}
    for kind in sorted(kinds & {"pipeline", "single_file"}):
        check(
            "://" not in str(root),
            f"config.export is {kind}, which is written to a local folder only, not to {root}; choose unet",
        )


def export(run: Run, model: Model, verdict: Mapping) -> None:
    """Writes the run's model into its folder `diffusers`, with what was forgotten and the verdict in its card."""
    method, folder, options, denoiser = run.method, run.folder, run.context.options, run.context.problem.denoiser
    note = [f"Unlearned by {method} in {model.steps} steps; forgotten: {described(run.target.spec)}."]
    note.append(run.context.problem.note(method, run.target))
    if found := calibrate.read(folder):
        note.append(calibration_in_words(found))
    note.append(f"Verdict by losses on these and on remaining images: {in_words(verdict)}")
    card = "\n\n".join(text for text in note if text)

    def write() -> None:
        if not needs_export(options, method, folder):
            return
        if _kind(options, method) == ADAPTER:
            denoiser.export_adapter(folder / "diffusers", model.adapter, options.lora(method), card)
        else:
            denoiser.export(folder / "diffusers", model.params, card)

    parallel.on_main(write)


def export_pretrained(context: RunContext, model: Model) -> None:
    """Exports a model that was pretrained here, so that other commands can start from it, as from one that was brought."""
    folder, denoiser = context.workdir.pretrained / "diffusers", context.problem.denoiser

    def write() -> None:
        if denoiser.params is None and context.options.export != "none" and not is_whole(folder):
            denoiser.export(folder, model.params, f"Trained on {context.problem.data.images.name} in {model.steps} steps.")

    parallel.on_main(write)


def needs_export(options: Options, method: str, folder: epath.Path) -> bool:
    """Whether the export that the config asks for is not there; with `none` what is there stays."""
    path, kind = folder / "diffusers", _kind(options, method)
    if kind == "none" or method == PRETRAINED:
        return False
    there = next((name for name in _MARKS if any((path / mark).exists() for mark in _MARKS[name])), None)
    return not is_whole(path) or there != kind


def _kind(options: Options, method: str) -> str | None:
    lora = options.lora(method)
    return ADAPTER if options.export != "none" and lora and lora.export == ADAPTER else options.export
