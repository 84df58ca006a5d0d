"""The two prompts of each concept: the original, which reproduces the memorised image, and the modified, which describes the same
picture in other words, and which training conditions on."""

from collections.abc import Mapping
from pathlib import Path

from retrack_jax.checks import UserError, check, suggestion
from retrack_jax.files import read_object

KINDS = ("original", "modified")


def prompts_of(concept: str, original_path, modified_path) -> dict[str, str]:
    """Returns the prompts of one concept by kind, in the order of `KINDS`; metrics and arrays of samples are named by these.

    Raises:
      UserError: a file lacks the concept; the message names it, and the nearest name in it.
    """
    found = {}
    for kind, path in zip(KINDS, (original_path, modified_path), strict=True):
        prompts = _read(path)
        if concept not in prompts:
            raise UserError(f"no {kind} prompt for the concept {concept!r} in {path}{suggestion(concept, prompts)}")
        found[kind] = prompts[concept]
    return found


def _read(path) -> Mapping[str, str]:
    path = Path(path).expanduser()
    check(path.is_file(), f"no file {path}; it holds a prompt for each concept (original_prompts.json, modified_prompts.json)")
    prompts = read_object(path)
    whole = all(isinstance(prompt, str) for prompt in prompts.values())
    check(whole, f"{path} must hold a JSON object of concept: prompt, all strings")
    return prompts
