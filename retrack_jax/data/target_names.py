"""What to forget, by stable names: a name, `a+b+c`, `@list.txt`, a glob, `label:7`, `random:0.05`."""

import codecs
import hashlib
import logging
import math
import os
import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check, nearest_names, shown
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.tables import composed

logger = logging.getLogger(__name__)
_RANDOM, _RANDOM_SEED = "random:", 0x0F05
_SLUG_LENGTH = 80  # a file name may take 255 bytes; paths add to it


def resolve_target(spec: str, images: ImageSet) -> np.ndarray:
    """Returns the rows that `spec` names, int64, sorted, each once.

    In this order: a name as it stands; `@FILE`, one target per line; `label:N`; `random:SHARE`; a path, or the last parts of one,
    that only one image has; parts joined by `+`; a glob as in a shell (`*` and `?` do not match `/`, `**` does); the name in the
    source's other numbering (`ImageSet.other_name`). Names are compared in Unicode's composed form (NFC).

    Raises:
      UserError: nothing has that name (with the nearest ones), a label that no image has, several images with that name.
    """
    names = _Names(images)
    rows = np.unique(np.array(names.rows(str(spec).strip()), np.int64))
    check(len(rows) < len(images), f"the target {spec!r} is the whole set of {len(images)} images; nothing would remain to keep")
    return rows


class _Names:
    def __init__(self, images: ImageSet):
        self._images = images
        self._names = [composed(name) for name in images.ids]
        self._row_of = {name: row for row, name in enumerate(self._names)}

    def rows(self, spec: str) -> list[int]:
        check(bool(spec), "a target is empty; name an image, a+b+c, @list.txt, a glob or label:7")
        name = composed(spec)
        if name in self._row_of:
            return [self._only([self._row_of[name]] if len(self._row_of) == len(self._names) else self._named(name), spec)]
        if spec.startswith("@") and not _is_group(spec):
            return [row for line in _list_lines(spec) for row in self._listed(line, spec)]
        if re.fullmatch(r"label:[^+]*", spec):
            return self._with_label(spec.removeprefix("label:"))
        if is_random(spec):
            return self._random_share(spec.removeprefix(_RANDOM))
        if paths := self._with_path(name):
            return [self._only(paths, spec)]
        if _is_group(spec):
            return [row for part in parts_of(spec) for row in self.rows(part)]
        if any(sign in spec for sign in "*?["):
            return self._matching(name)
        return [self._by_other_name(name)]

    def _named(self, name: str) -> list[int]:
        return [row for row, known in enumerate(self._names) if known == name]

    def _only(self, rows: list[int], spec: str) -> int:
        shown = ", ".join(self._images.ids[row] for row in rows[:3])
        if len({self._names[row] for row in rows}) < len(rows):
            shown += ", equal but for the Unicode form of their letters; rename one of them"
        check(len(rows) == 1, f"{len(rows)} images are named {spec!r}: {shown}; give the path below the folder")
        return rows[0]

    @cached_property
    def _with_last_part(self) -> dict[str, list[int]]:
        rows = defaultdict(list)
        for row, name in enumerate(self._names):
            rows[name.rsplit("/", 1)[-1]].append(row)
        return rows

    def _with_path(self, name: str) -> list[int]:
        """The images whose path ends in the parts of `name`, or that are the file at the path `name`."""
        path = os.path.normpath(os.path.expanduser(name))
        if path in self._row_of:
            return self._named(path)
        rows = self._with_last_part.get(path.rsplit("/", 1)[-1], [])
        folder = self._images.folder
        above = "" if folder is None else composed(Path(os.path.abspath(folder)).as_posix()).rstrip("/") + "/"
        ending = path if path.startswith("/") else f"/{path}"
        found = [row for row in rows if f"{above or '/'}{self._names[row]}".endswith(ending)]
        if found or folder is None or not os.path.exists(os.path.expanduser(name)):
            return found
        there = os.path.realpath(os.path.expanduser(name))
        return [row for row in rows if os.path.realpath(folder / self._images.ids[row]) == there]

    def _matching(self, pattern: str) -> list[int]:
        pattern = os.path.expanduser(pattern).removeprefix("./")
        if self._images.folder is not None:
            pattern = pattern.removeprefix(f"{composed(os.path.abspath(self._images.folder))}/")
        matches = _glob(pattern)
        rows = [row for row, name in enumerate(self._names) if matches.fullmatch(name)]
        check(bool(rows), f"no image of {self._images.name} matches {pattern!r}; names look like {self._examples()}")
        deeper = 0 if "/" in pattern else sum(map(bool, map(_glob(f"**/{pattern}").fullmatch, self._names))) - len(rows)
        if deeper > 0:
            logger.info("%r matches %d images; **/%s would match %d more in subfolders", pattern, len(rows), pattern, deeper)
        return rows

    def _listed(self, line: str, spec: str) -> list[int]:
        nested = composed(line) not in self._row_of and any(part.strip().startswith("@") for part in line.split("+"))
        check(not nested, f"{_list_path(spec)} (the target is {spec!r}) names another list, {line!r}; write its names instead")
        return self.rows(line)

    def _with_label(self, text: str) -> list[int]:
        labels = self._images.labels
        without = f"the target is 'label:{text}', but {self._images.name} has no labels; name images, or set config.data.labels"
        check(labels is not None, without)
        check(
            re.fullmatch(r"-?\d+", text) is not None, f"the target is 'label:{text}'; a label is a whole number, such as label:7"
        )
        rows = np.flatnonzero(np.asarray(labels) == int(text)).tolist()
        if not rows:
            present = np.unique(labels)
            shown = ", ".join(map(str, present[:20])) + (", ..." if len(present) > 20 else "")
            raise UserError(f"no image of {self._images.name} has label {text}; its labels are {shown}")
        return rows

    def _random_share(self, text: str) -> list[int]:
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        count = round(share * len(self._images)) if 0.0 < share < 1.0 else 0
        total = len(self._images)
        check(count > 0, f"the target is 'random:{text}'; give the share of {total} images to forget, such as random:0.05")
        return np.random.default_rng(_RANDOM_SEED).permutation(len(self._images))[:count].tolist()

    def _by_other_name(self, name: str) -> int:
        other = self._images.other_name and self._images.other_name(name)
        if other in self._row_of:
            return self._row_of[other]
        near = nearest_names(name, self._images.ids)
        examples = f"names look like {self._examples()}; a target is one of them, or several"
        hint = f"did you mean {' or '.join(near)}?" if near else examples
        raise UserError(f"no image of {self._images.name} is named {name!r}; {hint}")

    def _examples(self) -> str:
        ids = self._images.ids
        return ", ".join(dict.fromkeys((ids[0], ids[len(ids) // 2], ids[-1])))


def target_specs(targets) -> list[str]:
    """Returns each target of `config.targets`, whose members may hold several, separated by commas."""
    return [part.strip() for target in targets for part in str(target).split(",") if part.strip()]


def is_random(spec: str) -> bool:
    """Whether `spec` is a random share of the images, the same ones for every seed and method; a group with others is not."""
    return spec.strip().startswith(_RANDOM) and "+" not in spec


def parts_of(spec: str) -> list[str]:
    """Returns the members of a group, or the target alone; a list file may have a + in its own name."""
    return [part.strip() for part in spec.split("+")] if _is_group(spec) else [spec.strip()]


def _is_group(spec: str) -> bool:
    return "+" in spec and not (spec.startswith("@") and _list_path(spec).exists())


def _list_path(spec: str) -> Path:
    return Path(spec[1:]).expanduser()


def _list_lines(spec: str) -> list[str]:
    """The lines of a list in UTF-8, or in UTF-16 with the mark by which Windows writes it; ends of lines of any system."""
    path = _list_path(spec)
    try:
        content = path.read_bytes()
        utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = [line.strip() for line in re.split(r"[\r\n]+", content.decode("utf-16" if utf_16 else "utf-8-sig"))]
    except FileNotFoundError as error:
        raise UserError(f"no file {path} (the target is {spec!r}); it lists what to forget, one name per line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} (the target is {spec!r}): {error}") from error
    lines = [line for line in lines if line]
    check(bool(lines), f"{path} (the target is {spec!r}) names nothing; write one name per line")
    return lines


def _glob(pattern: str) -> re.Pattern:
    """The paths that a shell's pattern matches: `*`, `?`, `[...]` and `[!...]` within a folder, `**` across folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\])", pattern)
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    translated = []
    for part in parts:
        if part.startswith("[") and part.endswith("]"):
            inside = part[1:-1].replace("\\", r"\\")
            inside = f"^{inside[1:]}" if inside[0] in "!^" else inside
            translated.append(f"(?!/)[{inside}]")
        else:
            translated.append(signs.get(part) or re.escape(part))
    try:
        return re.compile("".join(translated), re.DOTALL)
    except re.error as error:
        raise UserError(f"the target {pattern!r} is not a pattern ({error}); write [ as [[] if it is part of a name") from error


def described(spec: str) -> str:
    """Returns a target in words for others to read: a list by its file's name and the first eight names in it, not its path."""

    def words(part: str) -> str:
        return f"{_list_path(part).name} ({shown(_list_lines(part))})" if part.startswith("@") else part

    return " + ".join(map(words, parts_of(spec)))


def slug(spec: str) -> str:
    """Returns a file name for a target: the spec itself where it can be one, else cleaned, cut and with a short hash.

    Two targets never share one. That of `@list.txt` changes with what the file lists.
    """
    spec = str(spec).strip()
    source = spec
    for part in parts_of(spec):
        if part.startswith("@"):
            source += "\n" + "\n".join(sorted(set(_list_lines(part))))
    shown = Path(spec).name if spec.startswith("@") else spec  # the folder of a list says nothing about the target
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", shown).strip("._-")
    common = re.fullmatch(r"(label|hf|tfds|random):[A-Za-z0-9_.]+", spec) is not None
    if common or (plain == spec and not re.match(r"(label|hf|tfds|random)_", spec) and len(plain) <= _SLUG_LENGTH):
        return plain
    return f"{plain[:_SLUG_LENGTH]}-{hashlib.sha256(source.encode()).hexdigest()[:8]}".strip("-")
