"""The networks whose training steps `bench.py --model` times, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


class Sum(nn.Module):
    """The sum of two branches over the same input."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


# Channels, blocks and kernel size of each stage of RepLKNet-31B: Ding et al., "Scaling Up Your Kernels to 31x31",
# CVPR 2022, arXiv:2203.06717, section 4. Each stage has half the resolution of the one before.
REPLKNET_31B = ((128, 2, 31), (256, 2, 29), (512, 18, 27), (1024, 2, 13))
REPLKNET_SMALL_KERNEL = 5  # beside every large one while training; merged into it afterwards


def replknet_31b() -> nn.Module:
    """RepLKNet-31B as it is trained, without stochastic depth; its depthwise convolutions are 53."""

    def conv(channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(out_channels))

    def depthwise(channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(channels))

    channels = REPLKNET_31B[0][0]
    layers = [conv(3, channels, 3, stride=2), nn.ReLU(), depthwise(channels, 3), nn.ReLU()]
    layers += [conv(channels, channels, 1), nn.ReLU(), depthwise(channels, 3, stride=2), nn.ReLU()]
    for width, blocks, kernel in REPLKNET_31B:
        if width != channels:
            layers += [conv(channels, width, 1), nn.ReLU(), depthwise(width, 3, stride=2), nn.ReLU()]
            channels = width
        for _ in range(blocks):
            large_kernel = nn.Sequential(
                nn.BatchNorm2d(channels),
                conv(channels, channels, 1),
                nn.ReLU(),
                Sum(depthwise(channels, kernel), depthwise(channels, REPLKNET_SMALL_KERNEL)),
                nn.ReLU(),
                conv(channels, channels, 1),
            )
            feed_forward = nn.Sequential(
                nn.BatchNorm2d(channels), conv(channels, 4 * channels, 1), nn.GELU(), conv(4 * channels, channels, 1)
            )
            layers += [Sum(nn.Identity(), large_kernel), Sum(nn.Identity(), feed_forward)]
    layers += [nn.BatchNorm2d(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    network = nn.Sequential(*layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # with PyTorch's weights the output of the untrained network is a mere bias
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    return network


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        try:
            import torchvision
        except (ImportError, RuntimeError) as error:  # RuntimeError: one made for another torch
            raise RuntimeError(
                f"this network needs torchvision, which cannot be imported ({error}): pip install torchvision"
            ) from error
        model = getattr(torchvision.models, name)(weights=None)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("layer_scale"):  # ConvNeXt's 1e-6 would hide its convolutions from any check
                nn.init.ones_(parameter)
        return model

    return build


@dataclass(frozen=True)
class Network:
    title: str
    build: Callable[[], nn.Module]
    batch: int
    precisions: tuple[str, ...]  # bfloat16 is under autocast


BOTH = ("float32", "bfloat16")
NETWORKS = {
    "mobilenet_v2": Network("MobileNetV2", _torchvision("mobilenet_v2"), 128, BOTH),
    "efficientnet_b0": Network("EfficientNet-B0", _torchvision("efficientnet_b0"), 128, BOTH),
    "convnext_tiny": Network("ConvNeXt-T", _torchvision("convnext_tiny"), 128, BOTH),
    "replknet_31b": Network("RepLKNet-31B", replknet_31b, 32, ("bfloat16",)),
}
