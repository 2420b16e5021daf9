"""Train osnet_x1_0 with torchreid's own engine on drawn people.

python train_torchreid.py ROOT OUT.pth.tar SECONDS
"""

import contextlib
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torchreid.reid import data, engine, models, optim

ROOT, OUT, SECONDS = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])


def samples(folder: str) -> list[tuple[str, int, int]]:
    """(path, pid, camid) of the crops of one part, as Market-1501 names them, without junk."""
    paths = [path for path in sorted((ROOT / folder).glob("*.jpg")) if not path.name.startswith("-1")]
    return [(str(path), int(path.name[:4]), int(path.name[6]) - 1) for path in paths]


class DrawnPeople(data.ImageDataset):
    """The training part, relabelled, and the test part."""

    def __init__(self, **options: object) -> None:
        train = samples("bounding_box_train")
        labels = {pid: label for label, pid in enumerate(sorted({pid for _, pid, _ in train}))}
        train = [(path, labels[pid], camid) for path, pid, camid in train]
        super().__init__(train, samples("query"), samples("bounding_box_test"), **options)


class OutOfTime(Exception):
    """The budget is spent."""


class TimedEngine(engine.ImageSoftmaxEngine):
    """torchreid's engine, which stops in time."""

    def forward_backward(self, batch: dict[str, object]) -> dict[str, float]:
        if time.monotonic() > END:
            raise OutOfTime
        return super().forward_backward(batch)


random.seed(0)
np.random.seed(0)
torch.manual_seed(0)
data.register_image_dataset("drawn", DrawnPeople)
manager = data.ImageDataManager(
    root=str(ROOT), sources="drawn", height=128, width=64, batch_size_train=32, batch_size_test=64,
    transforms=["random_flip"], use_gpu=False, workers=0,
)  # fmt: skip
model = models.build_model("osnet_x1_0", num_classes=manager.num_train_pids, pretrained=False)
model = model.to(memory_format=torch.channels_last)  # ten times as fast on a CPU
optimizer = optim.build_optimizer(model, optim="adam", lr=1e-3)
runner = TimedEngine(manager, model, optimizer=optimizer, use_gpu=False, label_smooth=True)
END = time.monotonic() + SECONDS
logs = tempfile.mkdtemp()
with contextlib.suppress(OutOfTime):
    runner.run(save_dir=logs, max_epoch=1000, print_freq=10)
shutil.rmtree(logs)
# as torchreid's save_checkpoint writes it
torch.save({"state_dict": model.state_dict(), "epoch": runner.epoch, "rank1": 0.0}, OUT)
print(f"{runner.epoch} epochs")
