"""What the stages ask of an experiment: the images, the network and how both meet, built once from the config.

Stages never look at the config's data or model themselves, so an experiment in another space is another class with these methods:
`pixels.PixelExperiment`, `text_to_image.TextToImageExperiment`. `kinds.py` chooses by the config.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from etils import epath

from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.evaluate.results import Results
from retrack_jax.notation import ModelEpsFn, PyTree
from retrack_jax.problem.target import ForgetData, Target
from retrack_jax.run.workdir import Workdir


class Experiment(Protocol):
    """Rows are numbers of training images; parameters are trees of float32 arrays.

    Attributes:
      schedule: the noise schedule.
      eps_fn: `(params, x_t, t, *condition) -> eps_pred`, one function object throughout, so that programs are compiled once.
      has_dropout: whether the network has dropout, which training turns on.
      num_timesteps: T of the schedule.
    """

    schedule: Schedule
    eps_fn: ModelEpsFn
    has_dropout: bool

    @property
    def num_timesteps(self) -> int: ...

    def imported_params(self) -> PyTree | None:
        """The checkpoint's parameters, on the host, or None where the model is pretrained here."""

    def init_params(self, seed: int) -> PyTree:
        """Random parameters."""

    def inputs(self, target: Target | None = None) -> dict[str, str]:
        """Name -> digest of all that was read; without a target of what does not depend on one. Names stand in messages."""

    def all_rows(self) -> np.ndarray:
        """The rows of every training image, int `[N]`."""

    def target(self, spec: str) -> Target:
        """What the user asked to forget. Raises `UserError` where it is not there, or leaves too few images."""

    def gather(self, rows: np.ndarray) -> Callable[[np.ndarray], PyTree]:
        """Returns `positions [b] -> batch` within `rows`: images as `data.dataset.to_x_0` takes them, for the remain stream."""

    def condition(self, target: Target) -> tuple[jax.Array, ...]:
        """Further arguments of the network, such as a prompt's embedding."""

    def prepare_targets(self, targets: Sequence[Target], num_neighbors: int, backend: str) -> None:
        """Does once what `forget_data` would do anew for each target of a sweep."""

    def forget_data(self, target: Target, num_neighbors: int, backend: str) -> ForgetData:
        """The forgotten images and, with `num_neighbors` K > 0, the K nearest remaining ones of each."""

    def pretrained_folder(self, workdir: Workdir, target: Target) -> epath.Path:
        """Where the pretrained model's samples and metrics lie."""

    def num_samples(self, target: Target) -> int:
        """How many images `sample` makes."""

    def sampling_digest(self, target: Target) -> str:
        """A digest of all that samples depend on beside the parameters: parts of another digest are not used again."""

    def sample(
        self, target: Target, params: PyTree, *, out_dir, fingerprint: str, progress: Callable[[int, int], None]
    ) -> dict[str, np.ndarray]:
        """Draws samples and returns the arrays of `samples.npz`.

        Args:
          target: what is forgotten; prompts are its own.
          params: replicated; they may be used up.
          out_dir: where finished parts are kept, so that a run that was stopped goes on.
          fingerprint: of parameters and settings; parts of another are ignored.
          progress: called with (images done, in all) after every batch; what it raises ends sampling.
        """

    def export(self, path, params: PyTree, note: str) -> None:
        """Writes the model as diffusers saves it, with `note` in its card."""

    def describe_data(self, target: Target) -> dict:
        """What was remembered and forgotten, for provenance: plain JSON."""

    def describe_sampler(self) -> dict:
        """How samples were drawn, for provenance: plain JSON."""

    def evaluate(
        self,
        target: Target,
        model: Callable,
        pretrained: Callable,
        arrays: dict[str, np.ndarray],
        path,
        workdir: Workdir,
        should_stop: Callable[[], bool],
    ) -> Results:
        """Returns the metrics of one model that `config.eval.metrics` names.

        Args:
          target: what is forgotten.
          model, pretrained: return the `stages.Model` to evaluate and the one before unlearning; called only where needed.
          arrays: the model's `samples.npz`.
          path: the JSON file that keeps what is computed, stopped or not.
          workdir: where networks trained for metrics lie.
          should_stop: asked between metrics; true raises `Preempted`.
        """

    def pictures(self, target: Target, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict:
        """The arrays that the report of a run shows, from the samples of both models (`report.html.run_report`)."""

    def comparison_pictures(self, target: Target, samples: dict[str, dict[str, np.ndarray]]) -> dict:
        """The arrays that the comparison shows, from method -> samples (`report.comparison.comparison_report`)."""
