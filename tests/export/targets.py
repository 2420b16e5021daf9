"""Models that exports for other programs refuse or have to convert."""

import dataclasses

from pmm.adoption.image_options import ImageOptions
from pmm.adoption.onnx_adopt import adopt_onnx
from pmm.adoption.onnx_options import OnnxOptions
from pmm.export.source import open_source


def with_resize(monkeypatch, module, **changes):
    """`module` sees a checkpoint whose crops are prepared in another way."""

    def changed(path):
        source = open_source(path)
        return dataclasses.replace(source, preprocessing=dataclasses.replace(source.preprocessing, **changes))

    monkeypatch.setattr(module, "open_source", changed)


def adopted_onnx(path, people, **images):
    """The path of the adopted file made of the foreign one at `path`, beside it."""
    out = path.with_name("adopted.onnx")
    return adopt_onnx(path, out, ImageOptions(**images), OnnxOptions(), dataset="market1501", root=str(people)).path


def contents(folder):
    """Bytes and time of each file in `folder`: a file that is written anew is another one."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
