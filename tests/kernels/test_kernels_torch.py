"""The kernels as PyTorch operators: they compile, have gradients, and run the published networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import relative_l2
from torch.nn import functional as F

pytest.importorskip("triton")

from moesr.kernels import dispatch
from moesr.kernels.attention import reference
from moesr.kernels.attention.op import OP
from moesr.kernels.attention.operator import attention, attention_packed
from moesr.kernels.interpreter import repair
from moesr.kernels.launch import kernel_module
from moesr.kernels.sampler_step.operator import sampler_step
from moesr.kernels.tile_blend.operator import tile_blend
from moesr.kernels.tile_gather.operator import tile_gather
from moesr.kernels.vq_nearest import reference as vq_reference
from moesr.kernels.vq_nearest.operator import vq_nearest
from moesr.training.config import AutoencoderConfig, UNetConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

LIMIT = 1e-5  # largest relative L2 error of a network in float32


def heads(*size: int, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_(grad) for _ in range(3)]


def loop_arguments(operator):
    slots = torch.tensor([[0, 1, 2, 5], [-1, 0, 0, 0]])
    if operator is tile_gather:
        return [torch.randn(3, 9, 9)], slots, 4, 5, torch.float32
    if operator is tile_blend:
        sums, flags = [torch.zeros(3, 9, 9)], torch.zeros(1, dtype=torch.int32)
        return (
            sums,
            flags,
            [torch.ones(9, 9)],
            torch.randn(2, 3, 4, 5),
            torch.rand(4, 5),
            slots[:, :3].clone(),
        )
    z, sums, history = torch.randn(3, 3, 5, 5)
    return z, sums, torch.tensor([0.9, 0.1, 0.3, 0.2, 1.5, -1.0]), 3, 1, history


@pytest.mark.parametrize("operator", [tile_gather, tile_blend, sampler_step], ids=lambda o: o._name)
def test_loop_operators_pass_opcheck(operator):
    torch.library.opcheck(operator, loop_arguments(operator))


@pytest.mark.parametrize("tokens_last", [False, True])
def test_attention_operator_passes_opcheck(tokens_last):
    size = (2, 32, 19) if tokens_last else (2, 19, 32)
    torch.library.opcheck(attention, (*heads(*size, grad=True), 0.2, tokens_last))


def test_vq_nearest_operator_passes_opcheck():
    codes = torch.randn(7, 3)
    torch.library.opcheck(vq_nearest, (torch.randn(1, 3, 2, 5), codes, codes))


@pytest.mark.parametrize("tokens_last", [False, True])
def test_attention_gradients(tokens_last):
    size = (2, 32, 19) if tokens_last else (2, 19, 32)
    q, k, v = heads(*size, grad=True)
    attention(q, k, v, 0.3, tokens_last).square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    plain = [x.mT if tokens_last else x for x in (q, k, v)]
    F.scaled_dot_product_attention(*plain, scale=0.3).square().sum().backward()
    for one, other in zip(got, (q, k, v), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break():
    codes = torch.randn(9, 16)

    def both(q, k, v):
        out = attention(q, k, v, 0.25) + 1
        values, _ = vq_nearest(out[:, :, :, None].transpose(1, 2), codes, codes)
        return values * 2

    q, k, v = heads(1, 5, 16)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), both(q, k, v))


def test_compiled_loop_changes_canvases_in_place():
    def step(z, sums, coefficients):
        sampler_step(z, sums, coefficients[:3].clone(), 3, 1)
        return z + sums

    arguments = loop_arguments(sampler_step)[:3]
    copies = [x.clone() for x in arguments]
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*arguments)
    assert torch.equal(got, step(*copies))
    assert torch.equal(arguments[0], copies[0])


@pytest.mark.parametrize("width", [48, 1024])
@pytest.mark.parametrize("tokens_last", [False, True])
def test_unsupported_widths_use_pytorch_attention(width, tokens_last):
    q, k, v = heads(*((2, width, 5) if tokens_last else (2, 5, width)))
    want = reference.attention(q, k, v, 0.1, tokens_last)
    got = attention(q, k, v, 0.1, tokens_last)
    torch.testing.assert_close(got, want)
    assert got.is_contiguous()
    with pytest.raises(ValueError, match="power of two from 16 to 512"):
        OP.plan({"heads": 2, "tokens": 5, "width": width}, "fp32", 90)


def test_mixed_shapes_and_types_are_refused():
    q, k, v = heads(1, 4, 32)
    with pytest.raises(ValueError, match="one type"):
        attention(q, k.half(), v, 1.0)
    with pytest.raises(ValueError, match="heads, tokens, width"):
        attention(q[0], k[0], v[0], 1.0)
    with pytest.raises(ValueError, match=r"\[heads, 3, width, tokens\]"):
        attention_packed(q[None], 1.0)


def test_packed_attention_equals_attention():
    qkv = torch.stack(heads(4, 16, 9), 1)
    torch.library.opcheck(attention_packed, (qkv, 0.25))
    assert torch.equal(attention_packed(qkv, 0.25), attention(*qkv.unbind(1), 0.25, True))


def test_double_precision_is_computed_without_kernels():
    q, k, v = (x.double() for x in heads(1, 4, 32))
    want = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(attention(q, k, v, 1.0), want, rtol=1e-12, atol=1e-12)
    codes = torch.randn(5, 3)
    values, _ = vq_nearest(codes.t()[None, :, :, None].double(), codes, codes)
    assert torch.equal(values[0, :, :, 0].t(), codes.double())


@pytest.mark.parametrize("row", [0, 1])
def test_attention_with_one_dominant_score_does_not_overflow(row):
    q, k, v = heads(1, 40, 32)
    q[0, row], k[0, 37] = 100.0, 100.0  # this score is far above all others
    out = attention(q, k, v, 1.0)
    torch.testing.assert_close(out[0, row], v[0, 37])


@pytest.mark.parametrize("operator", [tile_gather, tile_blend, sampler_step], ids=lambda o: o._name)
def test_loop_operators_compute_references_if_kernels_cannot_run(operator, monkeypatch):
    results = []
    for kernels in (True, False):
        torch.manual_seed(0)
        arguments = loop_arguments(operator)
        monkeypatch.setattr(f"moesr.kernels.{operator._name}.operator.has_kernels", lambda _, k=kernels: k)
        out = operator(*arguments)
        results.append(out if operator is tile_gather else (*arguments[0], arguments[1]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_network_operators_compute_references_if_kernels_cannot_run(monkeypatch):
    monkeypatch.setattr(dispatch, "has_kernels", lambda _: False)
    q, k, v = heads(2, 5, 32)
    torch.testing.assert_close(attention(q, k, v, 0.1), F.scaled_dot_product_attention(q, k, v, scale=0.1))
    codes = torch.randn(5, 3)
    assert vq_nearest(codes.t()[None, :, :, None].half(), codes, codes)[1].tolist() == [[0, 1, 2, 3, 4]]


def by_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Replace `scaled_dot_product_attention` of [B, heads, tokens, width] by our operator."""
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return attention(*flat, q.shape[-1] ** -0.5).unflatten(0, q.shape[:2])


def load(network: torch.nn.Module, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    network.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights.items()}, strict=True)
    return network.eval()


@torch.inference_mode()
def test_published_unet_with_our_attention_matches_golden(golden, published_weights, monkeypatch):
    data, calls = golden("unet_w32"), []
    network = load(DenoisingUNet(UNetConfig(width=32)), published_weights("unet_w32", "dev"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: calls.append(1) or by_kernel(*qkv))
    x = torch.from_numpy(data["x"])
    eps = network(x[:, :3], x[:, 3:], torch.from_numpy(data["t"]))
    assert len(calls) == 6
    assert data.error("eps", eps.numpy()) < LIMIT


@pytest.fixture(scope="module")
def decoder_c32(golden, published_weights):
    config = AutoencoderConfig(channels=32, codebook_size=256)
    network = load(Autoencoder(config), published_weights("decoder_c32", "dev"))
    return network, golden("decoder_c32")


@torch.inference_mode()
def test_nearest_codes_match_golden(decoder_c32):
    network, data = decoder_c32
    codes = network.quantize.embedding.weight
    z = torch.from_numpy(data["z"])
    values, indices = vq_nearest(z, codes, codes)
    assert torch.equal(indices.flatten().long(), network.quantize.indices(z))
    assert torch.equal(values, network.quantize(z))


@pytest.mark.slow
@torch.inference_mode()
def test_published_decoder_with_our_operators_matches_golden(decoder_c32, monkeypatch):
    (network, data), calls = decoder_c32, []
    codes = network.quantize.embedding.weight
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: calls.append(1) or by_kernel(*qkv))
    monkeypatch.setattr(network.quantize, "forward", lambda z: vq_nearest(z, codes, codes)[0])
    z, lr = torch.from_numpy(data["z"]), torch.from_numpy(data["lr_upsampled"])
    image = network.decode(z, lr, 1.0)
    assert len(calls) == 1
    assert data.error("image_w1", image.numpy()) < LIMIT


def test_chosen_code_is_nearest_up_to_rounding():
    generator = torch.Generator().manual_seed(4)
    z, codes = torch.randn(1, 3, 8, 16, generator=generator), torch.randn(8192, 3, generator=generator)
    _, indices = vq_nearest(z, codes, codes)
    flat = z.flatten(2)[0].t().double()
    distance = (flat[:, None] - codes.double()[None]).square().sum(-1)
    chosen = distance.gather(1, indices.flatten()[:, None].long())[:, 0]
    assert (chosen - distance.min(1).values).max() < 1e-6


def test_nan_latents_get_the_first_code():
    z, codes = torch.full((1, 3, 1, 2), torch.nan), torch.randn(200, 3)
    for found in (vq_nearest(z, codes, codes), vq_reference.vq_nearest(z, codes, codes)):
        assert found[1].tolist() == [[0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("tokens_last", [False, True])
def test_attention_at_the_decoders_size(tokens_last):
    """One program of the full grid runs: 64 queries from the middle against all 16,384 keys."""
    plan = OP.plan({"heads": 1, "tokens": 16384, "width": 512, "tokens_last": int(tokens_last)}, "fp16", 90)
    q, k, v = (x.half() for x in heads(1, 16384, 512))
    q *= 3
    given = [x.mT.contiguous() if tokens_last else x for x in (q, k, v)]
    step, out = plan.launches[0], torch.full_like(given[0], torch.nan)
    at = 64 * 77  # number of the first query; offset pointers make it the first of the launch
    moved = [x[..., at:] if tokens_last else x[:, at:] for x in (given[0], out)]
    kernel = kernel_module("attention").attention
    repair()
    kernel[(1, 1, 1)](moved[0], given[1], given[2], moved[1], 16384, 512**-0.5, **step.constants)
    got = (out.mT if tokens_last else out)[0]
    rows = slice(at, at + 64)
    want = torch.softmax(512**-0.5 * (q[0, rows].double() @ k[0].double().mT), -1) @ v[0].double()
    assert relative_l2(got[rows].numpy(), want.numpy()) < 5e-4
    assert got[:at].isnan().all() and got[at + 64 :].isnan().all()


@pytest.mark.slow
def test_nearest_code_at_the_decoders_size():
    """An eighth of the latents is enough, since programs are independent of one another."""
    generator = torch.Generator().manual_seed(5)
    z, codes = torch.randn(1, 3, 16, 128, generator=generator), torch.randn(8192, 3, generator=generator)
    values, indices = vq_nearest(z, codes, codes)
    want = vq_reference.vq_nearest(z, codes, codes)
    assert torch.equal(indices, want[1])
    assert torch.equal(values, want[0])
