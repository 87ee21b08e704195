"""The networks call the operators that have kernels, give the same results, and compile."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import stablesr
import torch
from conftest import relative_l2
from published_networks import CHANNELS_32, load
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moesr.kernels import dispatch
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet, operators
from moesr.training.networks.autoencoder import AttnBlock, VectorQuantiser
from moesr.training.networks.fusion import ResnetBlock
from moesr.training.networks.refinement import AFFBlock, AFFFilter, InvertedResidual
from moesr.training.networks.unet import AttentionBlock

DECODER = AutoencoderConfig(
    channels=16, channel_mult=(1, 2), res_blocks=1, codebook_size=64, norm_groups=4, fusion_level=0,
    fusion_blocks=1, filter_blocks=4,
)  # fmt: skip
UNET = UNetConfig(width=32, channel_mult=(1, 2), res_blocks=1, attention_factors=(2,), space_experts=1)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Operators(TorchDispatchMode):
    """A dispatch mode that counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        self.calls[name] += namespace == "moesr"
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> dict[str, int]:
        return dict(+self.calls)


@pytest.fixture
def on_gpu(monkeypatch):
    """Make the networks call the operators as on a GPU; the operators compute their references."""
    monkeypatch.setattr(operators, "has_kernels", lambda x: True)
    monkeypatch.setattr(dispatch, "has_kernels", lambda x: False)


@pytest.fixture
def interpreted(monkeypatch):
    """Make the operators run their kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(operators, "has_kernels", lambda x: True)


def filled(network: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a network with random weights and BatchNorm statistics, so that no zero weight hides a layer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 1.0
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.data = draw * fan**-0.5 if parameter.dim() > 1 else 1 + 0.2 * draw
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean = torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_var = 0.5 + torch.rand(norm.running_var.shape, generator=generator)
    return network.eval()


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


LATENT, IMAGE = normal(1, 3, 8, 8), normal(1, 3, 16, 16)
NOISY, TIMES = normal(2, 3, 8, 8), torch.tensor([5, 700])


def decode(network: nn.Module) -> torch.Tensor:
    assert isinstance(network, Autoencoder)
    return network.decode(LATENT, IMAGE)


def denoise(network: nn.Module) -> torch.Tensor:
    return network(NOISY, NOISY, TIMES)


def plainly(run, *arguments):
    """Return the result without our operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "has_kernels", lambda x: False)
        return run(*arguments)


@torch.no_grad()
def test_decoder_on_operators(on_gpu):
    network = filled(Autoencoder(DECODER))
    want = plainly(decode, network)
    with Operators() as used:
        got = decode(network)
    assert used.names == {
        "vq_nearest": 1, "group_norm_silu": 38, "attention": 1, "inverted_residual": 9, "aff_filter": 9
    }  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_expert_on_operators(on_gpu):
    network = filled(DenoisingUNet(UNET))
    want = plainly(denoise, network)
    with Operators() as used:
        got = denoise(network)
    assert used.names == {"group_norm_silu": 21, "attention_packed": 4}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_stablesr_on_operators(on_gpu):
    unet, encoder = (filled(kind(sizes)) for kind, sizes in (
        stablesr.NETWORKS["unet_narrow"], stablesr.NETWORKS["structcond_narrow"]
    ))  # fmt: skip
    z, t = normal(1, 4, 16, 16), torch.tensor([300])

    def run():
        return unet(z, t, encoder(z, t), normal(1, 7, 64))

    want = plainly(run)
    with Operators() as used:
        got = run()
    assert set(used.names) == {"group_norm_silu", "attention_packed"}
    assert relative_l2(got.numpy(), want.numpy()) < 1e-5


BLOCKS = {
    "resnet": (ResnetBlock(4, 6, 2), (2, 4, 5, 6)),
    "no_norm": (ResnetBlock(4, 4, 0), (1, 4, 5, 6)),
    "attention": (AttnBlock(16, 4), (2, 16, 3, 5)),
    "narrow_attention": (AttnBlock(12, 4), (1, 12, 3, 5)),
    "unet_attention": (AttentionBlock(32, 16, 4), (2, 32, 3, 4)),
    "inverted_residual": (InvertedResidual(4, 6), (1, 4, 5, 7)),
    "aff": (AFFBlock(4, 4, 2, 2), (1, 4, 6, 8)),
    "quantiser": (VectorQuantiser(70, 3), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks_on_kernels(name, layout, interpreted):
    """The layers give the same values, type and strides if they run the kernels."""
    block, size = BLOCKS[name]
    block, x = filled(block), normal(*size).contiguous(memory_format=layout)
    want, got = plainly(block, x), block(x)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert got.stride() == want.stride()


@torch.no_grad()
def test_half_precision_block_returns_half_precision(interpreted):
    block, x = filled(AFFBlock(4, 6, 2, 2)), normal(1, 4, 6, 8)
    want = block(x)
    got = block.half()(x.half())
    assert got.dtype == torch.float16
    assert relative_l2(got.float().numpy(), want.numpy()) < 5e-3


def gradients(block: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_(), *block.parameters()]
    return list(torch.autograd.grad(block(inputs[0]).square().sum(), inputs))


def test_training_uses_only_the_filter_operator(on_gpu):
    """The gradients equal those of the network without our operators."""
    block, x = filled(AFFBlock(4, 6, 2, 2)).train(), normal(2, 4, 6, 8)
    want = plainly(gradients, block, x)
    with Operators() as used:
        got = gradients(block, x)
    assert used.names == {"aff_filter": 1}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch_norm_in_training_uses_no_operator(on_gpu):
    with Operators() as used:
        filled(InvertedResidual(4, 4)).train()(normal(2, 4, 5, 5))
    assert not used.names


def test_filter_in_training_is_float32(on_gpu):
    module, x = filled(AFFFilter(4, 2)), normal(1, 4, 6, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plainly(module, x.float()).bfloat16())


@pytest.mark.slow
@torch.inference_mode()
def test_published_refinement_block_on_kernels(golden, published_weights, interpreted):
    data = golden("decoder_c32")
    network = load(Autoencoder(CHANNELS_32), published_weights("decoder_c32", "dev"))
    assert isinstance(network, Autoencoder)
    with Operators() as used:
        out = network.decoder.unet_1.conv1(torch.from_numpy(data["aff_in"]))
    assert used.names == {"group_norm_silu": 2, "inverted_residual": 1, "aff_filter": 1}
    assert data.error("aff_block_out", out.numpy()) < 1e-5


@pytest.mark.parametrize(
    ("make", "run", "count"),
    [
        pytest.param(lambda: Autoencoder(DECODER), decode, 58, id="decoder", marks=pytest.mark.slow),
        pytest.param(lambda: DenoisingUNet(UNET), denoise, 25, id="expert"),
    ],
)
@torch.no_grad()
def test_compiles_without_a_graph_break(make, run, count, on_gpu):
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    network = filled(make())
    got = torch.compile(run, fullgraph=True, backend=keep)(network)
    torch.testing.assert_close(got, run(network))
    assert sum("moesr." in str(node.target) for g in graphs for node in g.graph.nodes) == count


def test_training_compiles_without_a_graph_break(on_gpu):
    block, x = filled(AFFBlock(4, 4, 2, 2)), normal(1, 4, 6, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, x), gradients(block, x), rtol=1e-4, atol=1e-4)


def test_kernels_run_only_on_cuda_and_in_inference():
    cuda, cpu = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
    assert operators.has_kernels(cuda) == operators.TRITON
    assert not operators.has_kernels(cpu)
    assert not operators.infers(cuda)
    with torch.inference_mode():
        assert operators.infers(cuda) == operators.TRITON
        assert not operators.infers(cpu)


@pytest.mark.parametrize(("capability", "kernels"), [((7, 5), False), ((8, 0), True), ((10, 3), True)])
def test_unsupported_gpus_compute_the_reference(capability, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    assert dispatch.has_kernels(tensor) == kernels  # type: ignore[arg-type]


WITHOUT_TRITON = """
import sys
if sys.argv[1:]:
    sys.modules["triton"] = None  # makes `import triton` raise ImportError
from moesr.training.networks import operators
print(operators.TRITON, "triton.language" in sys.modules)
"""


@pytest.mark.parametrize("blocked", [True, False])
def test_networks_import_without_triton(blocked):
    command = [sys.executable, "-c", WITHOUT_TRITON, *(["blocked"] if blocked else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(operators.TRITON and not blocked), "False"]
