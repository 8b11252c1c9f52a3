"""torch.compile and torch.jit, which cannot trace the kernels, get the model's own path."""

from contextlib import nullcontext

import pytest
import torch

import hf_models
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackWarning


@pytest.fixture
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("clean_dynamo")
@torch.no_grad()
@pytest.mark.parametrize("how", ["patched", "by name"])
def test_torch_compile_gets_the_model_s_own_path_without_a_graph_break(how):
    warpdecode.hf.register()
    expected = hf_models.experts_layer()(*hf_models.layer_inputs())
    layer = (
        warpdecode.hf.patch(hf_models.experts_layer()) if how == "patched" else hf_models.experts_layer("warp_decode")
    )
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.warns(WarpDecodeFallbackWarning, match="torch.compile") if how == "patched" else nullcontext():
        got = compiled(*hf_models.layer_inputs())
    with hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        assert torch.equal(compiled(*hf_models.layer_inputs()), got)
        assert not served
        layer(*hf_models.layer_inputs())  # the same layer, not compiled
        assert served
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("clean_dynamo")
@torch.no_grad()
def test_torch_compile_raises_under_strict():
    compiled = torch.compile(warpdecode.hf.patch(hf_models.experts_layer(), strict=True), backend="eager")
    with pytest.raises(RuntimeError, match=r"Qwen3MoeExperts cannot be served: torch\.compile"):
        compiled(*hf_models.layer_inputs())


@torch.no_grad()
def test_torch_jit_trace_records_the_model_s_own_path():
    layer = warpdecode.hf.patch(hf_models.experts_layer())
    hidden, ids, weights = hf_models.layer_inputs()
    with pytest.warns(WarpDecodeFallbackWarning, match="torch.jit"):
        traced = torch.jit.trace(lambda h: layer(h, ids, weights), hidden, check_trace=False)
    other = hidden.roll(1, 0) * 2
    assert torch.allclose(traced(other), layer(other, ids, weights), rtol=1e-4, atol=1e-4)
