"""bench.py --model without a GPU: RepLKNet-31B's layers, the table of networks, and a row of it on the CPU."""

import collections
import copy
import dataclasses
import functools
import sys

import pytest
import torch
from torch import nn

import bench
import bench_models
import depthwise_inline


def test_replknet_has_the_published_layers_and_parameters():
    counts = collections.Counter()

    def count(module, inputs, output):
        counts[module.kernel_size[0], inputs[0].shape[-1], output.shape[-1]] += 1

    with torch.device("meta"):
        network = bench_models.replknet_31b()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            assert module.groups == module.in_channels == module.out_channels
            module.register_forward_hook(count)
    assert network(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    stages = {(31, 56): 2, (29, 28): 2, (27, 14): 18, (13, 7): 2}
    large = {(kernel, size, size): blocks for (kernel, size), blocks in stages.items()}
    small = {(5, size, size): blocks for (_, size), blocks in stages.items()}
    stem_and_transitions = dict.fromkeys([(3, 112, 112), (3, 112, 56), (3, 56, 28), (3, 28, 14), (3, 14, 7)], 1)
    assert counts == large | small | stem_and_transitions
    assert counts.total() == 53
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert round(parameters / 1e6, 1) == 79.9  # while training; 79.5 once the small kernels are merged


@pytest.fixture
def thin_replknet(monkeypatch):
    """RepLKNet with few channels and blocks, for the CPU."""
    monkeypatch.setattr(bench_models, "REPLKNET_31B", ((4, 1, 31), (8, 1, 29), (16, 2, 27), (32, 1, 13)))
    torch.manual_seed(0)
    return bench_models.replknet_31b()


def test_replknet_trains_and_is_replaced(thin_replknet):
    network = depthwise_inline.replace_depthwise(copy.deepcopy(thin_replknet))
    assert sum(isinstance(module, depthwise_inline.DepthwiseConv2d) for module in network.modules()) == 5 + 2 * 5
    images = torch.randn(2, 3, 64, 64)
    expected = thin_replknet(images)
    torch.testing.assert_close(network(images), expected)
    expected.square().mean().backward()
    for parameter in thin_replknet.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any()


def test_the_table_of_networks():
    rows = {(n.title, n.batch, precision) for n in bench_models.NETWORKS.values() for precision in n.precisions}
    assert rows == {("RepLKNet-31B", 32, "bfloat16")} | {
        (title, 128, precision)
        for title in ("MobileNetV2", "EfficientNet-B0", "ConvNeXt-T")
        for precision in ("float32", "bfloat16")
    }


def tiny_network():
    layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, stride=2, groups=4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))


TINY = bench_models.Network("Tiny", tiny_network, 2, ("float32", "bfloat16"))


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lets networks be measured on the CPU, with few and small images."""
    monkeypatch.setattr(bench, "IMAGE_SIZE", 16)
    monkeypatch.setattr(bench, "STEPS_MS", 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "measure_model", functools.partial(bench.measure_model, device="cpu"))


@pytest.mark.parametrize("precision", TINY.precisions)
def test_a_row_of_the_table(on_the_cpu, precision):
    row = bench.measure_model(TINY, precision, "nhwc")
    assert row.pop("pytorch_step_ms") > 0 and row.pop("ours_step_ms") > 0
    assert row.pop("pytorch_step_spread") >= 0 and row.pop("ours_step_spread") >= 0
    assert row == {"model": "Tiny", "batch": 2, "layout": "nhwc", "precision": precision}
    assert torch.backends.cudnn.benchmark is False


def test_copies_of_a_network_take_turns(on_the_cpu, monkeypatch):
    """Each round has one of them, before and after; who is first changes."""
    trained = []

    class Watched(nn.Sequential):
        def forward(self, x):
            if self.training:
                replaced = any(isinstance(m, depthwise_inline.DepthwiseConv2d) for m in self)
                trained.append((id(self), replaced))
            return super().forward(x)

    network = dataclasses.replace(TINY, build=lambda: Watched(*tiny_network()))
    monkeypatch.setattr(bench, "STEPS_MS", 0.0)  # one step a round
    bench.measure_model(network, "float32", "nchw")
    rounds = trained[-2 * bench.STEP_ROUNDS :]
    assert len(set(rounds)) == 2 * bench.COPIES
    firsts = [replaced for _, replaced in rounds[::2]]
    assert firsts == [bool(index % 2) for index in range(bench.STEP_ROUNDS)]
    assert all(first[1] != second[1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert all(sum(at == one for at in rounds) == bench.STEP_ROUNDS // bench.COPIES for one in rounds)


def wrong_forward(self, x):
    return nn.Conv2d.forward(self, x).flip(1)


def test_a_network_that_computes_something_else_is_found(on_the_cpu, monkeypatch):
    monkeypatch.setattr(depthwise_inline.DepthwiseConv2d, "forward", wrong_forward)
    with pytest.raises(RuntimeError, match="the outputs differ by"):
        bench.measure_model(TINY, "float32", "nchw")
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.parametrize("name", bench_models.NETWORKS)
@pytest.mark.usefixtures("thin_replknet")
def test_the_outputs_of_each_network_depend_on_its_convolutions(monkeypatch, name):
    if name != "replknet_31b":
        pytest.importorskip("torchvision", reason="needs torchvision")
    before = bench_models.NETWORKS[name].build().eval()
    after = depthwise_inline.replace_depthwise(copy.deepcopy(before))
    images = torch.randn(1, 3, 64, 64)
    assert bench.difference(before, after, images) < 1e-6
    monkeypatch.setattr(depthwise_inline.DepthwiseConv2d, "forward", wrong_forward)
    assert bench.difference(before, after, images) > 0.1


def test_networks_are_compiled_first_and_saved_as_they_are_measured(on_the_cpu, monkeypatch, capsys):
    def select(direction, dtype, channels_last, sizes):
        return f"{direction}_{dtype}_{channels_last}_s{sizes[7]}/tile", "" if sizes[7] == 2 else "source"

    def no_torchvision():
        raise RuntimeError("this network needs torchvision: pip install torchvision")

    compiled, saved = {}, []
    monkeypatch.setattr(depthwise_inline, "_select", select)
    monkeypatch.setattr(depthwise_inline, "_obtain_all", compiled.update)
    networks = {
        "missing": bench_models.Network("Missing", no_torchvision, 2, ("float32",)),
        "tiny": TINY,
        "out_of_memory": dataclasses.replace(TINY, title="OutOfMemory", precisions=("float32",)),
    }
    measure = bench.measure_model

    def measure_model(network, precision, layout):
        if network.title == "OutOfMemory":
            raise torch.OutOfMemoryError("CUDA out of memory.\nand more")
        return measure(network, precision, layout)

    monkeypatch.setattr(bench, "NETWORKS", networks)
    monkeypatch.setattr(bench, "measure_model", measure_model)
    failed = bench.measure_models(list(networks), lambda models: saved.append(len(models)))
    printed = capsys.readouterr().out
    assert failed == 1 + 2  # Missing, and OutOfMemory in both layouts
    assert "Missing is left out: this network needs torchvision: pip install torchvision" in printed
    assert printed.count("FAILED: OutOfMemoryError: CUDA out of memory.\n") == 2
    assert saved == [1, 2, 3, 4]
    assert len(compiled) == 2 * 2 * 3 and set(compiled.values()) == {"source"}
    assert "forward_torch.bfloat16_True_s1" in compiled


def test_torchvision_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(RuntimeError, match=r"needs torchvision, which cannot be imported .*: pip install torchvision$"):
        bench_models.NETWORKS["convnext_tiny"].build()
