"""Stable Diffusion 1.x, 2.x and XL in one file of weights, as webui, ComfyUI and kohya's scripts use it: read, and written.

Such a file has no configs and no tokenizers. They come from a folder that diffusers saved, or from the hub: as for diffusers'
`from_single_file`, those of Stable Diffusion 1.5 and of XL's base model by default. A file of 2.x does not say what its network
predicts, so its folder must be given.
"""

import logging
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from retrack_jax.checkpoints.diffusers_export import card_and_licenses, replacing, write_files
from retrack_jax.checks import check
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.files import file_digest, write_whole
from retrack_jax.notation import PyTree
from retrack_jax.weights.file_tensors import FileTensors
from retrack_jax.weights.folder import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, open_weights
from retrack_jax.weights.hub import is_id, local_model, snapshot, text_files
from retrack_jax.weights.ldm_names import SD1, SD2, XL, Layout, PartOfFile, in_file, places
from retrack_jax.weights.model_file import open_model_file
from retrack_jax.weights.names import TorchTensor, new_attention_name, to_torch, torch_shapes
from retrack_jax.weights.safetensors_io import write_safetensors

NAME = "model.safetensors"  # of the file in an export
# Of averaged weights, which an unlearned network must not be accompanied by: programs may take them in its place.
_AVERAGED = "model_ema."
# Empty tensors that tell programs how the network was trained -> what scheduler_config.json says then.
_MARKERS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
# Tables of noise levels, of ldm and of sgm -> alpha_bar in falling order.
_TABLES = {"alphas_cumprod": lambda table: table, "denoiser.sigmas": lambda table: np.sort(1 / (1 + table**2))[::-1]}
_log = logging.getLogger(__name__)


class SingleFile:
    """The tensors of one file, by part.

    Attributes:
      path: of the file.
      layout: which model it is, and how it names things.

    Raises:
      UserError: the file is damaged, or holds something else, such as a LoRA.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tensors, self.layout = open_model_file(path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, which takes as long as reading it."""
        return file_digest(self.path)

    def part(self, part: str, target: PyTree) -> FileTensors:
        """Returns the tensors of a part under the names of diffusers and transformers; `target` has its network's shapes."""
        return PartOfFile(self._tensors, self.layout.parts[part], torch_shapes(target))

    def besides_unet(self) -> dict[str, np.ndarray]:
        """Returns everything but the UNet and averages of it, as the file has it."""
        left_out = (self.layout.parts["unet"].prefix, _AVERAGED)
        return {name: self._tensors[name] for name in self._tensors if not name.startswith(left_out)}

    def configs(self, given: str) -> Path:
        """Returns the folder with the configs and the tokenizers: `given`, a folder or an id, or what goes with the file.

        Raises `UserError` if nothing is given and the file does not tell, or the hub does not give it.
        """
        check(
            bool(given or self.layout.configs),
            f"{self.path} is of {self.layout.name}, and does not say what its network predicts; set config.pipeline to the "
            "folder or the hub's name of the model that it was made from",
        )
        predicts_v = self._tensors.metadata.get("modelspec.prediction_type") in ("v", "v_prediction")
        check(
            bool(given) or not predicts_v or "v_pred" in self._tensors,
            f"{self.path} says in its metadata that its network predicts v, and the configs that usually go with it do not; set "
            "config.pipeline to the folder or the hub's name of a model that does",
        )
        name = given or self.layout.configs
        return snapshot(name, text_files) if is_id(name) else local_model(name)

    def schedule(self, config: dict, folder: Path) -> Schedule:
        """Returns the noise schedule that `config`, from `folder`, and the file's markers describe together.

        Raises `UserError` if the file has a table of noise levels, and it is that of another schedule.
        """
        told = dict(marker for name, marker in _MARKERS.items() if name in self._tensors)
        if told:
            _log.info("%s says %s by its tensors %s", self.path, told, ", ".join(set(_MARKERS) & set(self._tensors)))
        if told.get("rescale_betas_zero_snr") and config.get("_class_name") == "PNDMScheduler":
            told["_class_name"] = "DDIMScheduler"  # with the same keys, and this one, which PNDM's does not have
        schedule = Schedule.from_config(config | told)
        # A table may be older than the training that gave the last step no signal.
        possible = [schedule] + [schedule.replace(rescale_betas_zero_snr=False)] * schedule.rescale_betas_zero_snr
        for name, to_alpha_bar in _TABLES.items():
            if name not in self._tensors:
                continue
            fits = self._tensors.shape(name) == (schedule.num_train_timesteps,)
            table = to_alpha_bar(np.asarray(self._tensors[name], np.float64)) if fits else None
            check(
                fits and any(np.allclose(table, one.alpha_bar64, rtol=0.01, atol=1e-4) for one in possible),
                f"{self.path} was made with another noise schedule, {name}, than {folder / 'scheduler'} has; set config.pipeline "
                "to the folder of the model that it was made from",
            )
        return schedule


def export_single_file(path, pipeline, unet_params: PyTree, *, note: str | None = None) -> None:
    """Writes the folder `path` with one file of the pipeline and the UNet `unet_params`, licenses and a model card.

    The other parts are as in the source, bit for bit. diffusers' `from_single_file` reads the file. If the network predicts v or
    its last step has no signal, the file says so as ComfyUI and webui expect it; diffusers must be told by `config`, and of 2.x
    also that the network predicts noise.

    Raises:
      UserError: as `export_diffusers`; or `path` is not local.
    """
    check("://" not in str(path), f"{path} is no local folder; one file is exported to one (config.export=unet goes anywhere)")
    source, file = pipeline.path, pipeline.file
    layout = file.layout if file else _layout_of_folder(pipeline)
    markers = {name: np.zeros(0, np.float32) for name, (field, value) in _MARKERS.items()
               if getattr(pipeline.schedule, field) == value}  # fmt: skip
    with replacing(path, source) as folder:
        folder.mkdir(parents=True)
        others = markers | (file.besides_unet() if file else _parts_of_folder(source, layout))
        unet = list(to_torch(unet_params))
        where = places(layout.parts["unet"], [tensor.name for tensor in unet])
        tensors = [tensor._replace(name=where[tensor.name].name) for tensor in unet]
        for name, array in sorted(others.items()):
            tensors.append(TorchTensor(name, array.dtype, array.shape, partial(np.ascontiguousarray, array)))
        write_whole(folder / NAME, lambda temporary: write_safetensors(temporary, tensors))
        write_files(folder, card_and_licenses(source, note))


def _layout_of_folder(pipeline) -> Layout:
    check(pipeline.network == "unet", "one file is written of Stable Diffusion 1.x, 2.x and XL alone; export a pipeline")
    first, *others = pipeline.text_encoders
    if others:
        return XL
    return SD2 if first.module.hidden_act == "gelu" else SD1  # OpenAI's encoder, of 1.x, has quick_gelu


def _parts_of_folder(folder: Path, layout: Layout) -> dict[str, np.ndarray]:
    """Returns the VAE and the text encoders in `folder` as a single file keeps them."""
    _, vae = open_weights(folder / "vae", DIFFUSERS_WEIGHTS)
    arrays = in_file(layout.parts["vae"], {new_attention_name(name): vae[name] for name in vae})
    for part in layout.text_encoders:
        _, text = open_weights(folder / part, TRANSFORMERS_WEIGHTS)
        own = {name.removeprefix("text_model."): text[name] for name in text if not name.endswith("position_ids")}
        arrays |= in_file(layout.parts[part], own)
    return arrays
