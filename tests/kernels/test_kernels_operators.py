"""The decoder's kernels as PyTorch operators: fake tensors, gradients, torch.compile, interpreted kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from torch.library import opcheck

from moesr.kernels import dispatch
from moesr.kernels.aff_filter import reference
from moesr.kernels.aff_filter.operator import aff_filter
from moesr.kernels.check import errors
from moesr.kernels.group_norm_silu.operator import group_norm_silu
from moesr.kernels.inverted_residual import operator as residual
from moesr.kernels.inverted_residual.reference import fold, inverted_residual
from moesr.kernels.registry import OPS
from moesr.training.networks.refinement import InvertedResidual

CPU = torch.device("cpu")


def make(name: str, dtype: str = "fp32", **shape: int) -> list[torch.Tensor]:
    """Return the tensors of an operator in the order of its arguments."""
    return [v for v in OPS[name].inputs(shape, dtype, 1).values() if isinstance(v, torch.Tensor)]


FILTER = {"batch": 2, "channels": 8, "blocks": 2, "height": 6, "width": 8}
NORM = {"batch": 2, "channels": 6, "groups": 3, "height": 5, "width": 4}
RESIDUAL = {"batch": 2, "channels": 4, "out": 4, "height": 5, "width": 7}


OPERATORS = {
    "aff_filter": (aff_filter, FILTER, ()),
    "group_norm_silu": (group_norm_silu, NORM, (3, True, 1e-2)),
    "inverted_residual": (residual.inverted_residual, RESIDUAL, ()),
}


def doubles(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.double().requires_grad_() for t in tensors]


def test_filter_gradients():
    arguments = doubles(make("aff_filter", **FILTER))
    assert torch.autograd.gradcheck(torch.ops.moesr.aff_filter, arguments)
    grad = torch.randn_like(arguments[0])
    want = torch.autograd.grad(reference.aff_filter(*arguments), arguments, grad)
    for got, expected in zip(reference.aff_filter_backward(grad, *arguments), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
def test_norm_gradients(silu):
    arguments = doubles(make("group_norm_silu", **NORM))
    assert torch.autograd.gradcheck(lambda *a: torch.ops.moesr.group_norm_silu(*a, 3, silu, 0.1), arguments)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_epsilon_of_the_norm_is_used(layout):
    """The eps is as large as the variance, so the result depends on it; the kernel reads it at run time."""
    x, weight, bias = make("group_norm_silu", **NORM)
    x = x.contiguous(memory_format=layout)
    got = group_norm_silu(x, weight, bias, 3, False, 0.5)
    want = torch.nn.functional.group_norm(x, 3, weight, bias, 0.5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(torch.contiguous_format, "fp32", id="nchw-fp32"),
        pytest.param(torch.channels_last, "fp16", id="nhwc-fp16"),
        pytest.param(torch.contiguous_format, "fp16", id="nchw-fp16", marks=pytest.mark.slow),
        pytest.param(torch.channels_last, "fp32", id="nhwc-fp32", marks=pytest.mark.slow),
    ],
)
def test_operators_pass_opcheck(layout, dtype):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for name, (_, shape, extra) in OPERATORS.items():
        x, *rest = make(name, dtype, **shape)
        arguments = (x.contiguous(memory_format=layout), *rest, *extra)
        opcheck(getattr(torch.ops.moesr, name).default, arguments, test_utils=checks)


def test_compiles_without_a_graph_break():
    x, *rest = make("aff_filter", **FILTER)
    norm = make("group_norm_silu", **{**NORM, "channels": 8, "groups": 2})[1:]

    def block(x):
        return aff_filter(group_norm_silu(x, *norm, 2, False), *rest) + x

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_match_the_reference(name, layout, monkeypatch):
    """Values and strides are the same whether kernels run or not."""
    operator, shape, extra = OPERATORS[name]
    x, *rest = make(name, **shape)
    arguments = (x.contiguous(memory_format=layout), *rest, *extra)
    got = operator(*arguments)
    monkeypatch.setattr(dispatch, "has_kernels", lambda tensor: False)
    want = operator(*arguments)
    assert got.stride() == want.stride()
    assert not torch.equal(got, want), "the kernels did not run"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_unsupported_height_uses_the_reference():
    arguments = make("aff_filter", **{**FILTER, "height": 2 * 131})
    with pytest.raises(ValueError, match="factors 131 and 2, and the kernel takes at most 64"):
        OPS["aff_filter"].plan({**FILTER, "height": 2 * 131}, "fp32", 90)
    torch.testing.assert_close(aff_filter(*arguments), reference.aff_filter(*arguments))


@torch.inference_mode()
def test_folded_inverted_residual_matches_the_network():
    torch.manual_seed(0)
    network = InvertedResidual(6, 6).eval()
    for norm in (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_(1, 0.1)
        norm.bias.normal_()
    folded = [t for layer in network.block for t in fold(layer.block.conv.weight, layer.block.norm)]
    folded = [t.squeeze() if t.dim() == 4 else t for t in folded]
    x = torch.randn(2, 6, 9, 7)
    torch.testing.assert_close(inverted_residual(x, *folded), network(x), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_published_filter_matches_golden(golden, published_weights):
    data, weights = golden("decoder_c32"), published_weights("decoder_c32", "dev")
    prefix = "decoder.unet_1.conv1.filter."
    x, *rest = (
        torch.from_numpy(a)
        for a in (data["aff_in"], *(weights[prefix + n] for n in ("w1", "b1", "w2", "b2")))
    )
    got = aff_filter(x, *rest)
    assert data.error("aff_filter_out", got.numpy()) < 1e-5
    half = aff_filter(x.half(), *rest)
    assert data.error("aff_filter_out", half.float().numpy()) < OPS["aff_filter"].cases[1].tolerance


def test_tilings_of_small_gpus():
    """The smaller tiles for GPUs with 99 KiB of shared memory give the same result."""
    for name in ("aff_filter", "inverted_residual"):
        op = OPS[name]
        case = op.cases[1]
        assert case.dtype == "fp16"
        for error in errors(op, case, CPU, arch=86).values():
            assert error <= case.tolerance
