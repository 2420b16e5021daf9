"""What the owner of a network has: its weights in a file, and its embeddings.

python user_code.py weights SOURCE OUT.pth HEIGHT WIDTH
python user_code.py embed SOURCE WEIGHTS.pth IMAGES.npy OUT.npy
"""

import sys

import numpy as np
import torch

from pmm.adoption.factory import Factory

command, source, *rest = sys.argv[1:]
torch.manual_seed(0)
module = Factory.parse(source)()
if command == "weights":
    out, height, width = rest
    # batch-norms in their training mode get used to what comes: random weights alone magnify rounding
    with torch.no_grad():
        for _ in range(3):
            module.train()(torch.randn(8, 3, int(height), int(width)))
    torch.save({"state_dict": module.state_dict()}, out)
else:
    weights, images, out = rest
    content = torch.load(weights, weights_only=True)
    module.load_state_dict(content.get("state_dict", content))
    with torch.no_grad():
        np.save(out, module.eval()(torch.from_numpy(np.load(images))).numpy())
