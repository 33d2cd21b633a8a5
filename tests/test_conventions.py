"""What PyTorch users expect to compose: compile, export, autocast, torch.func, checkpoints, distributed training, ...

Each test runs on the CPU and on a GPU, through the function and through the operator beneath it: on the CPU the
function is F.conv2d, and the operator what is ours. What only a GPU has (CUDA graphs, streams, two devices, the
deterministic switch, rounding under autocast) is in test_gpu_operators.py and test_gpu_modules.py; copies, fused batch
norms and replaced networks are in test_api.py.
"""

import copy
import gc
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from depthwise_inline import DepthwiseConv2d, ModelNew, depthwise_conv2d, replace_depthwise

OPS = torch.ops.depthwise_inline
CHANNELS, STRIDE, PADDING, DILATION = 3, (2, 1), (1, 2), (1, 2)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES, indirect=True)


@pytest.fixture
def device(request):
    """On a GPU the general kernels serve: what surrounds them is tested here, and nothing has to be compiled."""
    if request.param == "cpu":
        yield "cpu"
    else:
        with reference.forced("general"), reference.full_float32():
            yield "cuda"


def by_pytorch(x, weight, bias=None):
    return F.conv2d(x, weight, bias, STRIDE, PADDING, DILATION, groups=CHANNELS)


def by_function(x, weight, bias=None):
    return depthwise_conv2d(x, weight, bias, STRIDE, PADDING, DILATION)


def by_operator(x, weight, bias=None):
    return OPS.forward(x, weight, bias, *STRIDE, *PADDING, *DILATION)


through_both = pytest.mark.parametrize("ours", [by_function, by_operator], ids=["function", "operator"])


class OperatorConv2d(DepthwiseConv2d):
    """A module that runs the operator on the CPU, too."""

    def _conv_forward(self, x, weight, bias):
        return OPS.forward(x, weight, bias, *self.stride, *self.padding, *self.dilation)


def draw(*shape, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def inputs(device, batch=2):
    """x, weight of multiplier 2, bias."""
    return (
        draw(batch, CHANNELS, 7, 9, device=device),
        draw(2 * CHANNELS, 1, 3, 2, device=device, seed=1),
        draw(2 * CHANNELS, device=device, seed=2),
    )


def networks(device):
    """One of ours, and one of nn.Conv2d with the same parameters."""
    torch.manual_seed(0)
    theirs = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.SiLU(), nn.Conv2d(4, 8, (3, 5), 2, (1, 2), groups=4), nn.Tanh()
    ).to(device, torch.float64)
    ours = replace_depthwise(copy.deepcopy(theirs))
    ours[2].__class__ = OperatorConv2d
    return ours, theirs


def gradients(function, *tensors):
    """A result, and the gradients of a scalar of it."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def module_gradients(module, x):
    x = x.detach().requires_grad_()
    out = module(x)
    return out.detach(), *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))


# --- torch.compile, torch.export, AOTInductor, TorchScript -----------------------------------------------------------


@pytest.fixture
def compiled():
    """torch.compile in one graph, without a second compilation for another size."""
    torch._dynamo.reset()

    def compiled(function, device, dynamic=False):
        backend = "inductor" if device == "cuda" else "aot_eager"
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)

    with torch._dynamo.config.patch(error_on_recompile=True):
        yield compiled
    torch._dynamo.reset()


@on_every_device
@through_both
@pytest.mark.parametrize("dynamic", (False, True), ids=["static", "dynamic"])
def test_compile(ours, dynamic, device, compiled):
    x, weight, bias = inputs(device, batch=4)
    step = compiled(lambda *tensors: ours(*tensors).sin(), device, dynamic)
    for image in (x, x[1:, :, :5].contiguous(), x[2:, :, :, :6].contiguous()) if dynamic else (x,):
        expected = gradients(lambda *tensors: by_pytorch(*tensors).sin(), image, weight, bias)
        torch.testing.assert_close(gradients(step, image, weight, bias), expected)


@on_every_device
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ("same", "valid"))
def test_compile_named_padding(padding, device, compiled):
    x, weight, bias = inputs(device)
    step = compiled(lambda *tensors: depthwise_conv2d(*tensors, 1, padding, DILATION), device)
    expected = F.conv2d(x[0], weight, bias, 1, padding, DILATION, groups=CHANNELS)
    torch.testing.assert_close(step(x[0], weight, bias), expected)


@on_every_device
def test_compile_module(device, compiled):
    ours, theirs = networks(device)
    x = draw(2, 4, 8, 9, device=device)
    torch.testing.assert_close(module_gradients(compiled(ours, device), x), module_gradients(theirs, x))


@on_every_device
@through_both
def test_compile_function_transforms(ours, device, compiled):
    """Gradients of each sample, and the tangent of that."""
    x, weight, _ = inputs(device)

    def per_sample(function):
        grads = torch.func.vmap(torch.func.grad(lambda w, x: function(x[None], w).pow(3).sum()), in_dims=(None, 0))
        return lambda x, w: torch.func.jvp(lambda w: grads(w, x), (w,), (w.cos(),))

    torch.testing.assert_close(compiled(per_sample(ours), device)(x, weight), per_sample(by_pytorch)(x, weight))


@on_every_device
def test_compile_under_autocast(device, compiled):
    """The second layer of a network: activations in bfloat16, parameters in float32."""
    x, weight, bias = (t.float() for t in inputs(device))
    x = x.bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        found, expected = (f(x, weight, bias) for f in (compiled(by_function, device), by_pytorch))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def exported(module, device):
    """A program with a dynamic batch and height."""
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4)},)
    return torch.export.export(module, (draw(2, 4, 8, 9, device=device),), dynamic_shapes=shapes)


@on_every_device
def test_export(device, tmp_path):
    ours, theirs = networks(device)
    program = exported(ours, device)
    nodes = [node for node in program.graph.nodes if node.target is OPS.forward.default]
    assert len(nodes) == (2 if device == "cuda" else 1)
    torch.export.save(program, tmp_path / "program.pt2")
    x = draw(3, 4, 11, 9, device=device)
    for loaded in (program, torch.export.load(tmp_path / "program.pt2")):
        torch.testing.assert_close(loaded.module()(x), theirs(x))


def check_package(ours, device, path):
    """Package the module of ours, or of PyTorch, load it, run it."""
    module, theirs = (network[2] for network in networks(device))
    torch._inductor.aoti_compile_and_package(
        exported(module if ours else theirs, device),
        package_path=path,
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False},
    )
    x = draw(3, 4, 11, 9, device=device)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), theirs(x))


@on_every_device
def test_aot_inductor(device, tmp_path):
    """It runs where depthwise_inline was imported before: the operators' schemas are defined there, not in a library.

    Elsewhere, so in C++ without Python, the error names the operator.
    """

    def in_a_process(code):  # what is wrong with compiled code may end it
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)

    def checked(ours, path):
        folders = [str(Path(__file__).parent), str(reference.ROOT)]
        call = f"t.check_package({ours}, {device!r}, {path!r})"
        return in_a_process(f"import sys; sys.path[:0] = {folders}; import test_conventions as t; {call}")

    path = str(tmp_path / "ours.pt2")
    done = checked(True, path)
    if done.returncode != 0:
        theirs = checked(False, str(tmp_path / "theirs.pt2"))
        if theirs.returncode != 0:
            pytest.skip(f"AOTInductor fails with nn.Conv2d, too: {theirs.returncode} {theirs.stderr[-500:]}")
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    done = in_a_process(f"import torch; torch._inductor.aoti_load_package({path!r})")
    assert done.returncode != 0 and "Could not find schema for depthwise_inline::forward" in done.stderr


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and tracing warns of every check
@on_every_device
@pytest.mark.parametrize("grad", (False, True), ids=["no_grad", "grad"])
def test_torchscript(grad, device, tmp_path):
    ours, theirs = networks(device)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(ours, draw(2, 4, 8, 9, device=device))
    traced.save(tmp_path / "traced.pt")
    x = draw(3, 4, 11, 7, device=device)
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), theirs(x))
    for model in (DepthwiseConv2d(4, 3), ModelNew(4, 3), ours):
        with pytest.raises(RuntimeError, match=r"DepthwiseConv2d cannot be scripted: expected torch\.export"):
            torch.jit.script(model)


@on_every_device
def test_symbolic_trace(device):
    """torch.fx does not see through our checks: trace first, then replace."""
    ours, theirs = networks(device)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(ours)
    x = draw(2, 4, 8, 9, device=device)
    traced = replace_depthwise(torch.fx.symbolic_trace(copy.deepcopy(theirs)))
    assert sum(isinstance(module, DepthwiseConv2d) for module in traced.modules()) == 2
    torch.testing.assert_close(module_gradients(traced, x), module_gradients(theirs, x))


# --- Autocast --------------------------------------------------------------------------------------------------------

MIXTURES = [  # of input, weight and bias
    *((dtype,) * 3 for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float32, torch.float32),
    (torch.float64, torch.float32, torch.float32),
]


@through_both
@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda dtypes: "_".join(str(d).removeprefix("torch.") for d in dtypes))
@pytest.mark.parametrize("cast_to", (torch.float16, torch.bfloat16))
def test_autocast(cast_to, dtypes, ours):
    """The dtypes, values and errors of F.conv2d; those of a GPU are in test_gpu_operators.py."""
    tensors = [t.to(dtype) for t, dtype in zip(inputs("cpu"), dtypes, strict=True)]

    def compare(is_error):
        if is_error:
            for function in (ours, by_pytorch):
                with pytest.raises(RuntimeError):
                    function(*tensors)
        else:
            found, expected = gradients(ours, *tensors), gradients(by_pytorch, *tensors)
            tolerance = 2 * max(torch.finfo(t.dtype).eps for t in expected)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    mixed = len(set(dtypes)) > 1
    with torch.autocast("cpu", dtype=cast_to):
        compare(mixed and torch.float64 in dtypes)
        with torch.autocast("cpu", enabled=False):
            compare(mixed)


# --- torch.func and forward mode -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_every_device
@through_both
@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), (1, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (2, 3, 1)],
    ids=str,
)
def test_vmap(in_dims, ours, device):
    tensors = [
        t if dim is None else torch.stack([t, t.cos(), t.exp()], dim)
        for t, dim in zip(inputs(device), in_dims, strict=True)
    ]
    slices = (
        [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)] for i in range(3)
    )
    expected = torch.stack([by_pytorch(*slice) for slice in slices])
    torch.testing.assert_close(torch.vmap(ours, in_dims)(*tensors), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_every_device
@through_both
def test_gradients_through_vmap(ours, device):
    """An ensemble: the stacked parameters require gradients outside of vmap, where requires_grad does not tell."""
    x, weight, bias = inputs(device)
    stacked = torch.stack([weight, weight.cos()]), torch.stack([bias, bias.exp()])

    def ensemble(function):
        return gradients(lambda *stacked: torch.vmap(function, (None, 0, 0))(x, *stacked), *stacked)

    torch.testing.assert_close(ensemble(ours), ensemble(by_pytorch))


def cubed(function):
    return lambda *tensors: function(*tensors).pow(3).sum()


TRANSFORMS = {  # of a function, at x, weight and bias
    "grad": lambda f, *at: torch.func.grad(cubed(f), (0, 1, 2))(*at),
    "vjp": lambda f, *at: torch.func.vjp(f, *at)[1](f(*at).cos()),
    "jvp": lambda f, *at: torch.func.jvp(f, at, tuple(t.cos() for t in at)),
    "jvp of weight": lambda f, x, w, b: torch.func.jvp(lambda w: f(x, w, b), (w,), (w.cos(),)),
    "jvp of bias": lambda f, x, w, b: torch.func.jvp(lambda b: f(x, w, b), (b,), (b.cos(),)),
    "jacrev": lambda f, *at: torch.func.jacrev(lambda *t: f(*t).sum((2, 3)), (0, 1, 2))(*at),
    "jacfwd": lambda f, *at: torch.func.jacfwd(lambda *t: f(*t).sum((2, 3)), (1, 2))(*at),
    "hessian": lambda f, x, w, b: torch.func.hessian(cubed(f), (1, 2))(x, w, b),
    "grad of grad": lambda f, *at: torch.func.grad(lambda *t: torch.func.grad(cubed(f), 1)(*t).square().sum())(*at),
    "jvp of grad": lambda f, *at: torch.func.jvp(torch.func.grad(cubed(f), (0, 1)), at, tuple(t.cos() for t in at)),
    "per sample": lambda f, x, w, b: torch.vmap(torch.func.grad(cubed(f), (1, 2)), (0, None, None))(x[:, None], w, b),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_every_device
@through_both
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name, ours, device):
    at = inputs(device)
    torch.testing.assert_close(TRANSFORMS[name](ours, *at), TRANSFORMS[name](by_pytorch, *at))


@on_every_device
def test_functional_call(device):
    ours, theirs = networks(device)
    x = draw(2, 4, 8, 9, device=device)

    def grads(network):
        return torch.func.grad(lambda p: torch.func.functional_call(network, p, x).square().sum())(
            {name: p.detach().sin() for name, p in network.named_parameters()}
        )

    torch.testing.assert_close(grads(ours), grads(theirs))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@on_every_device
@through_both
def test_gradcheck_forward_mode_and_batched(ours, device):
    tensors = [t.requires_grad_() for t in inputs(device)]
    gradcheck(ours, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    gradgradcheck(ours, tensors, check_fwd_over_rev=True, fast_mode=True)


@on_every_device
@through_both
def test_forward_mode_without_grad(ours, device):
    """no_grad switches off the backward mode alone."""
    x, weight, _ = inputs(device)
    with forward_ad.dual_level(), torch.no_grad():
        out = ours(forward_ad.make_dual(x, x.cos()), weight)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, by_pytorch(x.cos(), weight))


# --- Modules ---------------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing(use_reentrant, device):
    ours, theirs = networks(device)
    x = draw(2, 4, 8, 9, device=device).requires_grad_()
    for network, run in ((ours, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant)), (theirs, theirs)):
        run(x).square().sum().backward()
        network.input_grad, x.grad = x.grad, None
    torch.testing.assert_close(ours.input_grad, theirs.input_grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@on_every_device
def test_parametrized_module(device):
    x = draw(2, 4, 8, 9, device=device)
    found, expected = (
        module_gradients(nn.Sequential(*map(parametrizations.weight_norm, network[::2])), x)
        for network in networks(device)
    )
    torch.testing.assert_close(found, expected)


@on_every_device
def test_channels_last_module(device):
    """In float32, since on a GPU float64 is never in channels_last."""
    ours, theirs = (network.to(torch.float32, memory_format=torch.channels_last) for network in networks(device))
    x = draw(2, 4, 8, 9, device=device).float().contiguous(memory_format=torch.channels_last)
    found, expected = module_gradients(ours, x), module_gradients(theirs, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [t.stride() for t in found[:2]] == [t.stride() for t in expected[:2]]


@on_every_device
def test_built_on_the_meta_device(device):
    _, theirs = networks(device)
    x, state = draw(2, 4, 8, 9, device=device), theirs.state_dict()
    with torch.device("meta"):
        first, second = (
            nn.Sequential(
                DepthwiseConv2d(4, 3, padding=1), nn.SiLU(), OperatorConv2d(4, (3, 5), 2, (1, 2), out_channels=8)
            )
            for _ in range(2)
        )
    assert first(x.to("meta", torch.float32)).shape == theirs(x).shape[:1] + theirs(x).shape[1:]
    first.load_state_dict(state, assign=True)
    second.to(torch.float64).to_empty(device=device).load_state_dict(state)
    for network in (first, second):
        torch.testing.assert_close(network(x), theirs[:3](x))


# --- Distributed training --------------------------------------------------------------------------------------------


def train_in_parallel(rank, device, file):
    """One of two processes: gradients of half a batch, averaged, are those of the whole one."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=2)
    check_parallel_gradients(rank, device)
    # What fully_shard leaves is in reference cycles. Where those outlive the process group, one process in ten aborts
    # (PyTorch 2.14 with gloo, with nn.Conv2d, too).
    gc.collect()
    torch.distributed.destroy_process_group()


def check_parallel_gradients(rank, device):
    from torch.distributed import fsdp

    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    ours, theirs = networks(where)
    x = draw(4, 4, 8, 9, device=where)
    theirs(x).square().mean().backward()

    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(ours))
    sharded = copy.deepcopy(ours)
    mesh = torch.distributed.init_device_mesh(device, (2,))
    fsdp.fully_shard(sharded[2], mesh=mesh)
    fsdp.fully_shard(sharded, mesh=mesh)
    for network in (parallel, sharded):
        network(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        for a, b in zip(network.parameters(), theirs.parameters(), strict=True):
            grad = a.grad.full_tensor() if network is sharded else a.grad
            torch.testing.assert_close(grad, b.grad)


@on_every_device
def test_two_processes(device, tmp_path):
    """DistributedDataParallel and fully_shard: gloo on the CPU, NCCL on two GPUs."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(train_in_parallel, (device, tmp_path / "store"), nprocs=2)
