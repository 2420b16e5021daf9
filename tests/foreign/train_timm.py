"""Train a small vision transformer of timm on drawn people, with a plain loop.

python train_timm.py ROOT OUT.pth SECONDS
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

ROOT, OUT, SECONDS = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
paths = sorted((ROOT / "bounding_box_train").glob("*.jpg"))
pids = sorted({path.name[:4] for path in paths})
labels = torch.tensor([pids.index(path.name[:4]) for path in paths])
pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((64, 128), Image.BILINEAR)) for path in paths])
images = ((torch.from_numpy(pixels) / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()

torch.manual_seed(0)
network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(128, 64))
classifier = torch.nn.Linear(network.num_features, len(pids), bias=False)
optimizer = torch.optim.AdamW([*network.parameters(), *classifier.parameters()], lr=0.0, weight_decay=0.05)
begin, done, steps = time.monotonic(), 0.0, 0
while done < 1:
    for group in optimizer.param_groups:  # a short rise, then a slow fall to nothing when the time is up
        group["lr"] = 6e-4 * min(done / 0.05, 1) * 0.5 * (1 + math.cos(math.pi * done))
    chosen = torch.randint(len(paths), (32,))
    batch = images[chosen]
    flipped = torch.where(torch.rand(32, 1, 1, 1) < 0.5, batch.flip(3), batch)
    top, left = torch.randint(13, (1,)).item(), torch.randint(9, (1,)).item()
    shifted = F.pad(flipped, (4, 4, 6, 6))[:, :, top : top + 128, left : left + 64]
    # by cosine: embeddings are compared by their direction
    logits = 16 * F.linear(F.normalize(network(shifted)), F.normalize(classifier.weight))
    optimizer.zero_grad()
    F.cross_entropy(logits, labels[chosen], label_smoothing=0.1).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    steps += 1
    done = (time.monotonic() - begin) / SECONDS
torch.save(network.state_dict(), OUT)
print(f"{steps} steps")
