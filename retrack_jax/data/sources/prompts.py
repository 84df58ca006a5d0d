"""The two prompts of each concept: the original, which reproduces the memorised image, and the modified, which training
conditions on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retrack_jax.checks import UserError, check, suggestion
from retrack_jax.files import read_object

KINDS = ("original", "modified")


@dataclass(frozen=True)
class PromptPair:
    """A concept's prompts; `modified` describes the same picture in other words."""

    original: str
    modified: str

    def items(self) -> tuple[tuple[str, str], ...]:
        """Returns ((kind, prompt), ...) in the order of `KINDS`, which metrics and arrays of samples are named by."""
        return (("original", self.original), ("modified", self.modified))


def prompts_of(concept: str, original_path, modified_path) -> PromptPair:
    """Returns the prompts of one concept. Raises `UserError` naming the file that lacks it and the nearest name in it."""
    found = {}
    for kind, path in zip(KINDS, (original_path, modified_path), strict=True):
        prompts = _read(path)
        if concept not in prompts:
            raise UserError(f"no {kind} prompt for the concept {concept!r} in {path}{suggestion(concept, prompts)}")
        found[kind] = prompts[concept]
    return PromptPair(**found)


def _read(path) -> Mapping[str, str]:
    path = Path(path).expanduser()
    check(path.is_file(), f"no file {path}; it holds a prompt for each concept (original_prompts.json, modified_prompts.json)")
    prompts = read_object(path)
    whole = all(isinstance(prompt, str) for prompt in prompts.values())
    check(whole, f"{path} must hold a JSON object of concept: prompt, all strings")
    return prompts
