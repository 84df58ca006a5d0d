"""Writes the demo's images as files, to practice on: a folder of PNGs and two lists of names to forget.

    make demo                                             # its pretrained model is exported, too
    python examples/practice_images.py runs/practice
    retrack --config=custom --workdir=runs/practice/tshirt --config.checkpoint=runs/digits_tshirt/pretrained/diffusers \\
        --config.data.dir=runs/practice/images --config.targets=@runs/practice/tshirt.txt

`tshirt.txt` names what the model remembers. `digits.txt` names three digits that it does not: with it, the line
before training says that it shows no sign of remembering them.
"""

import sys
from pathlib import Path

from PIL import Image

from retrack_jax.data.sources.load import load_images


def main(out_folder: str, copies: int = 95) -> None:
    data = load_images({"source": "digits_tshirt", "copies": copies})
    folder = Path(out_folder) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(data.ids, data.images, strict=True):
        Image.fromarray(image[..., 0]).save(folder / f"{name}.png")
    names = [f"{name}.png\n" for name in data.ids]
    folder.with_name("tshirt.txt").write_text("".join(name for name in names if name.startswith("tshirt")))
    folder.with_name("digits.txt").write_text("".join(names[100:103]))
    print(f"{len(names)} images in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
