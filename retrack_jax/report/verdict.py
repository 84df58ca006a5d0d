"""The verdict of a run (evaluate/verdict.py) in words, for the terminal, a model card and the page."""

from collections.abc import Mapping

from retrack_jax.checks import figures
from retrack_jax.unlearn.calibration import LARGEST

BEYOND_NOISE = 3.0  # standard errors: a table of 64 files then has a false color in one of six
_UNCHANGED = {
    True: ("worse", "Not forgotten: the model still remembers."),
    False: ("", "Unchanged: there was no sign of memory."),
    None: ("", "Unchanged."),
}
_FORGOTTEN = {
    "forgotten": ("better", "Forgotten."),
    "singled out": ("worse", "Singled out: the loss is above what unseen images have, so that it stands out."),
    "unknown": ("", "Not known whether it was forgotten."),
}
_KEPT = {
    "kept": ("better", "Remaining images are kept."),
    "damaged": ("worse", "Remaining images are damaged."),
    "unknown": ("", "Not known whether remaining images are kept."),
}


def in_words(verdict: Mapping) -> str:
    """Returns a verdict as one line with its numbers."""
    return f"{' '.join(text for _, text in _answers(verdict))} ({verdict['why']})"


def calibration_in_words(found: Mapping) -> str:
    """Returns a calibration (unlearn/calibration.py) as one line with its curve."""
    where = f"{found['alpha']:.3g} of the way from the pretrained to the unlearned parameters"
    curve = ", ".join(f"{loss:.4g} at {alpha:.4g}" for alpha, loss in found["curve"])
    if found["alpha"] == 0:
        where += " (the pretrained model itself, whose loss is no lower)"
    elif found["alpha"] == LARGEST and found["loss"] < found["reference"]:
        where += " (as far as the search goes)"
    reference = f"for a loss of {figures(found['reference'])} on the forgotten images, and reached {figures(found['loss'])}"
    return f"Calibrated to {where}, {reference}. Loss along the way: {curve}."


def box(verdict: Mapping | None) -> dict | None:
    """Returns what the box on the page says, `{"answers": [(class or "", text), ...], "why": [line, ...]}`, or None."""
    if not verdict:
        return None
    why = verdict["why"].replace("+-", "±").replace("->", "→").split("; ")
    return {"answers": _answers(verdict), "why": [line[:1].upper() + line[1:] for line in why]}


def file_rows(verdict: Mapping | None) -> list[dict]:
    """Returns a row for each forgotten file: `{"name", "before", "after", "change", "word"}` as text.

    `word` is `better` or `worse` if the change is beyond `BEYOND_NOISE` times its noise. A rise is worse if it singles the images
    out, and neither if the verdict does not call them forgotten.
    """
    rows = []
    for file in (verdict or {}).get("files", ()):
        change = file["after"] - file["before"]
        rise = {"forgotten": "better", "singled out": "worse"}.get(verdict["forgotten"], "")
        word = "" if abs(change) <= BEYOND_NOISE * file["noise"] else rise if change > 0 else "worse"
        sign = "+" if change > 0 else "−" if change < 0 else ""
        shown = {time: figures(file[time]) for time in ("before", "after")}
        rows.append(
            {"name": file["name"], **shown, "change": f"{sign}{figures(abs(change))} ± {file['noise']:.2g}", "word": word}
        )
    return rows


def _answers(verdict: Mapping) -> list[tuple[str, str]]:
    unchanged = verdict["forgotten"] == "unchanged"
    first = _UNCHANGED[verdict["remembered_before"]] if unchanged else _FORGOTTEN[verdict["forgotten"]]
    return [first, _KEPT[verdict["kept"]]]
