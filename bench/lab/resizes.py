"""Measure by how many grey levels the resizes of other libraries differ from those that contracts name.

python -m bench.lab.resizes [--sharp DIR] [--crops 32] [--out FILE.json]

The calls are those of `pmm.artifacts.resize_calls`. Drawn crops of people (128x64) are shrunk to a third (43x21) and
enlarged to twice their size (256x128). DALI needs a GPU and is not measured.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from pmm.artifacts.resize_calls import OTHER, RESIZE_CALLS, Differences, ResizeCall, verdict
from pmm.data.crops import load_crops
from pmm.data.preprocessing import RESIZES, Crops, Resize
from pmm.data.readers import read_dataset
from pmm.data.samples import evenly_spaced
from pmm.data.synthetic.dataset import draw_dataset
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.environment import report_header
from pmm.utils.errors import InvalidFile
from pmm.utils.files import output_file, write_file
from pmm.utils.hardware import installed_version

SCHEMA = "pmm-resizes-1"
SIZES = {"shrunk": (43, 21), "enlarged": (256, 128)}
SHARP = """
const sharp = require("sharp"), fs = require("fs");
const [from, to, width, height, w, h, kernel] = process.argv.slice(2);
const raw = { width: Number(width), height: Number(height), channels: 3 };
sharp(fs.readFileSync(from), { raw })
  .resize(Number(w), Number(h), { fit: "fill", kernel, fastShrinkOnLoad: false })
  .raw().toBuffer().then((pixels) => fs.writeFileSync(to, pixels));
"""

Resizer = Callable[[Crops, int, int], Crops]
"""uint8 RGB [h, w, 3], height, width -> uint8 RGB of that size."""


def measure(crops: Crops, sharp: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Per resize of a contract, the differences of each call on `crops` [N, 128, 64, 3]; without those of sharp unless
    its folder, with node_modules, is given. Raises InvalidFile if it is not there."""
    _sharp_version(sharp)
    found: dict[str, list[dict[str, Any]]] = {}
    for (interpolation, antialias), name in RESIZES.items():
        rows = []
        for call in RESIZE_CALLS[name]:
            row: dict[str, Any] = {"library": call.library, "call": call.call}
            resizer = _resizer(call, sharp)
            for direction, (height, width) in SIZES.items():
                if resizer is None:
                    continue
                size = Resize(height=height, width=width, interpolation=interpolation, antialias=antialias)  # type: ignore[arg-type]
                row[direction] = _differences(list(crops), size, resizer)
            rows.append(row)
        found[name] = rows
    return found


def markdown(resizes: dict[str, list[dict[str, Any]]]) -> str:
    """The table of docs/contract.md, of the differences that `measure` found."""
    lines = ["| as | library | call | to a third | to twice |", "|---|---|---|--:|--:|"]
    for name, rows in resizes.items():
        for row in rows:
            cells = [name, row["library"], f"`{row['call']}`", *(_cell(row.get(direction)) for direction in SIZES)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(differences: Differences | None) -> str:
    if differences is None:
        return "not measured"
    text = f"{differences[0]:.2f} / {differences[1]:g}"
    return f"**{text}**" if verdict(differences) == OTHER else text


def _differences(crops: list[Crops], size: Resize, resizer: Resizer) -> Differences:
    expected = load_crops(crops, size).astype(np.int16)
    levels = np.abs(np.stack([resizer(crop, size.height, size.width) for crop in crops]) - expected)
    return round(float(levels.mean()), 2), float(levels.max())


def _resizer(call: ResizeCall, sharp: Path | None) -> Resizer | None:
    """What the call does; None where it cannot be measured."""
    words = call.call.replace(",", " ").replace(")", " ").replace("(", " ")
    options = [word for word in words.split() if word.startswith(("INTER_", "RESIZE_"))]
    if call.library == "OpenCV":
        return partial(_opencv, flag=options[0])
    if call.library == "OpenVINO":
        return partial(_openvino, algorithm=options[0])
    if call.library == "torchvision":
        return partial(_torchvision, cubic="BICUBIC" in call.call, antialias="antialias=True" in call.call)
    if call.library == "Pillow":
        return partial(_pillow, name=call.call.rpartition(".")[2].rstrip(")"))
    if call.library == "sharp" and sharp:
        return partial(_sharp, folder=sharp, kernel=call.call.split('kernel: "')[1].split('"')[0])
    return None


def _opencv(pixels: Crops, height: int, width: int, *, flag: str) -> Crops:
    import cv2

    return np.asarray(cv2.resize(pixels, (width, height), interpolation=getattr(cv2, flag)))


def _pillow(pixels: Crops, height: int, width: int, *, name: str) -> Crops:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling[name]))


def _torchvision(pixels: Crops, height: int, width: int, *, cubic: bool, antialias: bool) -> Crops:
    import torch
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    resized = functional.resize(image, [height, width], mode, antialias=antialias)
    return np.asarray(resized.permute(1, 2, 0))


def _openvino(pixels: Crops, height: int, width: int, *, algorithm: str) -> Crops:
    """Before a network that only returns its images."""
    import openvino
    from openvino import opset13
    from openvino.preprocess import PrePostProcessor, ResizeAlgorithm

    images = opset13.parameter([1, height, width, 3], np.uint8)
    same = opset13.result(opset13.maximum(images, opset13.constant(np.zeros(1, np.uint8))))
    prepared = PrePostProcessor(openvino.Model([same], [images]))
    prepared.input().tensor().set_layout(openvino.Layout("NHWC")).set_shape([1, *pixels.shape])
    prepared.input().model().set_layout(openvino.Layout("NHWC"))
    prepared.input().preprocess().resize(getattr(ResizeAlgorithm, algorithm))
    compiled = openvino.compile_model(prepared.build(), "CPU")
    return np.asarray(compiled(pixels[None])[0][0])


def _sharp(pixels: Crops, height: int, width: int, *, folder: Path, kernel: str) -> Crops:
    with tempfile.TemporaryDirectory() as scratch:
        before, after, script = (Path(scratch) / name for name in ("before", "after", "resize.js"))
        before.write_bytes(pixels.tobytes())
        script.write_text(SHARP)
        sides = map(str, (pixels.shape[1], pixels.shape[0], width, height))
        environment = {"NODE_PATH": str(folder.resolve() / "node_modules"), "PATH": "/usr/local/bin:/usr/bin:/bin"}
        words = ["node", str(script), str(before), str(after), *sides, kernel]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            problem = f"node did not resize with sharp ({done.stderr.strip()[:200]})"
            raise InvalidFile(problem, path=folder, expected="a folder in which npm has installed sharp")
        return np.frombuffer(after.read_bytes(), np.uint8).reshape(height, width, 3)


PROG = "bench.lab.resizes"


@dataclass(frozen=True, kw_only=True)
class ResizesCommand:
    """`python -m bench.lab.resizes ...`"""

    sharp: Annotated[Path | None, Arg("DIR")] = None
    """Folder in which npm has installed sharp (default: it is not measured)."""
    crops: Annotated[int, Arg(least=1)] = 32
    """Drawn crops to resize."""
    out: Path = Path("runs/resizes.json")
    """JSON file to write."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(ResizesCommand, prog=prog, description=__doc__ or "")
    out = output_file(command.out)
    libraries = {"opencv": installed_version("opencv-python-headless"), "sharp": _sharp_version(command.sharp)}
    report = {
        **report_header(SCHEMA),
        "libraries": {name: version for name, version in libraries.items() if version},
        "resizes": measure(drawn_crops(command.crops), command.sharp),
    }
    write_file(out, json.dumps(report, indent=1) + "\n")
    print(f"{markdown(report['resizes'])}report: {out}")


def drawn_crops(count: int) -> Crops:
    """Of people, uint8 RGB [count, 128, 64, 3]; the same each time."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "people"
        draw_dataset(root, ids=12, seed=0, workers=1)
        train = read_dataset("synthetic", root).train
        return load_crops([train[index].path for index in evenly_spaced(len(train), count)], 128, 64)


def _sharp_version(folder: Path | None) -> str:
    if folder is None:
        return ""
    package = folder / "node_modules" / "sharp" / "package.json"
    try:
        return str(json.loads(package.read_text())["version"])
    except (OSError, ValueError, KeyError) as error:
        raise InvalidFile("sharp is not there", path=package, hint=f"run npm install sharp in {folder}") from error


if __name__ == "__main__":
    command_line.run(main, prog=PROG)
