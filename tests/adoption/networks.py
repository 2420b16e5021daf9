"""Networks of users, each with one fault, as a module that is imported by name."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

SIZE = (32, 16)


class Plain(nn.Module):
    """What all are made from: convolution, batch-norm, mean, and a classifier that the embedding does not need."""

    def __init__(self, dim=8, classes=5):
        super().__init__()
        self.conv, self.norm, self.classifier = nn.Conv2d(3, dim, 3, 2), nn.BatchNorm2d(dim), nn.Linear(dim, classes)

    def features(self, images):
        return self.norm(self.conv(images)).relu().mean((2, 3))

    def forward(self, images):
        return self.features(images)


@dataclasses.dataclass
class Result:
    features: torch.Tensor
    maps: torch.Tensor


class Several(Plain):
    def __init__(self, kind="tuple"):
        super().__init__()
        self.kind = kind

    def forward(self, images):
        features = self.features(images)
        logits = self.classifier(features)
        return {
            "tuple": (logits, features),
            "dict": {"logits": logits, "features": features, "nothing": None},
            "dataclass": Result(features, images),
            "nested": [logits, {"a": features}],
            "none": {"nothing": None},
        }[self.kind]


class Maps(Plain):
    def forward(self, images):
        return self.conv(images)


class Labels(Plain):
    def forward(self, images):
        return self.features(images).argsort(1)


class LooksAtValues(Plain):
    def forward(self, images):
        features = self.features(images)
        if features.sum() > 0:
            features = features * 2
        return features


class FixedBatch(Plain):
    def forward(self, images):
        features = self.features(images)
        return features.view(int(images.shape[0]), -1)


class BranchesOnBatch(Plain):
    def forward(self, images):
        features = self.features(images)
        if images.shape[0] > 6:
            features = features * 2
        return features


class BranchesOnOne(Plain):
    def forward(self, images):
        features = self.features(images)
        if images.shape[0] == 1:
            features = features * 2
        return features


class ReadsData(Plain):
    def forward(self, images):
        return self.features(images) * self.norm.weight.data


class OneBatch(Plain):
    def forward(self, images):
        return self.features(images).view(2, -1)


class OtherSize(Plain):
    def forward(self, images):
        assert images.shape[2] == 224, "Input height doesn't match model"
        return self.features(images)


class OnCuda(Plain):
    def forward(self, images):
        raise RuntimeError("Found no NVIDIA driver on your system")


class TrainsAlways(Plain):
    """By the statistics of the batch, without running ones."""

    def forward(self, images):
        return F.batch_norm(self.conv(images), None, None, training=True).relu().mean((2, 3))


class KeepsStatistics(Plain):
    def forward(self, images):
        self.norm.num_batches_tracked += 1
        return self.features(images)


class DropsAlways(Plain):
    def forward(self, images):
        return F.dropout(self.features(images))


class NotFinite(Plain):
    def forward(self, images):
        return self.features(images).log() - float("inf")


class Constant(Plain):
    def forward(self, images):
        return self.features(images) * 0 + 1


class TwoInputs(Plain):
    def forward(self, images, cameras):
        return self.features(images) + cameras


class ChangesImages(Plain):
    """And pools as some do."""

    def forward(self, images):
        images.sub_(0.5)
        return self.features(images)[:, :, None, None]


class Unusual(Plain):
    def forward(self, images):
        return self.features(images).logcumsumexp(1)


def raises(problem="nothing works"):
    raise KeyError(problem)


def exits():
    raise SystemExit(3)


def returns_a_dict():
    return {"model": Plain()}


VALUE = 3


class Owner:
    @staticmethod
    def build(dim, *, classes=5):
        return Plain(dim, classes)
