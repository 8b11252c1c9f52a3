"""Whole transformers models, served by the kernels, against transformers' own eager path."""

import pytest
import torch

import hf_models
import warpdecode.hf

FAMILIES = sorted(hf_models.FAMILIES)

# How much larger the root mean square of our error may be than that of transformers' eager path, both against FP64.
# In bf16 and fp16 our layers round once where eager rounds five times, so ours should be smaller; but the error of the
# logits is mostly that of the attention and norms around the experts, which both runs have and which the experts'
# last bits stir anew. Those two draws of the same size, over some 500 correlated logits, differ by a tenth.
MARGIN_16 = 1.25
# In FP32 both paths keep FP32 sums and round a handful of times; only the order of the sums differs.
MARGIN_32 = 2.0


def _served_model(family: str, how: str) -> torch.nn.Module:
    if how == "by name":
        warpdecode.hf.register()
        return hf_models.build(family, implementation="warp_decode")
    return warpdecode.hf.patch(hf_models.build(family))


@torch.no_grad()
def _run(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits in fp64, each MoE layer's routing weight of every expert [batch, sequence, E])."""
    routing = []

    def keep(module, args, kwargs):
        weights = torch.zeros(tokens.numel(), module.down_proj.shape[0], dtype=torch.float64, device=tokens.device)
        weights.scatter_(1, args[1], args[2].double())
        routing.append(weights.view(*tokens.shape, -1))

    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in hf_models.experts_modules(model)]
    logits = model(tokens).logits.double()
    for hook in hooks:
        hook.remove()
    assert len(routing) == hf_models.MOE_LAYERS
    return logits, routing


def _assert_no_further_than_eager(family: str, how: str, dtype: torch.dtype, device: str, margin: float) -> None:
    tokens = hf_models.prompt().to(device)
    eager_model = hf_models.build(family).to(device, dtype)
    eager, eager_routing = _run(eager_model, tokens)
    # The same weights, already rounded to dtype, in FP64.
    exact, exact_routing = _run(eager_model.double(), tokens)
    with hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        ours, our_routing = _run(_served_model(family, how).to(device, dtype), tokens)
    assert served == [tokens.numel()] * hf_models.MOE_LAYERS

    # A token that rounding sends to another expert has another output, of which neither path is wrong; and it changes
    # the tokens after it. Only positions before the first such token are compared. (Phi's router also jumps between
    # weights of 0.5 and 1 for the same experts; rounding alone moves weights by hundredths.)
    same = torch.ones(tokens.shape, dtype=torch.bool, device=device)
    for exact_weights, *others in zip(exact_routing, eager_routing, our_routing, strict=True):
        for weights in others:
            same &= ((weights > 0) == (exact_weights > 0)).all(-1) & ((weights - exact_weights).abs().amax(-1) < 0.1)
    clean = same.int().cummin(dim=1).values.bool()
    assert clean.float().mean() >= 0.25, "nearly every token was routed differently: the comparison would be empty"

    error, eager_error = ((x - exact)[clean].pow(2).mean().sqrt().item() for x in (ours, eager))
    assert exact[clean].std() > 1, "degenerate logits"
    # Also that the reference is one: an eager path as far from it as the logits are large would prove nothing.
    assert 0 < eager_error < 0.1 * exact[clean].std()
    assert error <= margin * eager_error


@pytest.mark.parametrize("how", ["patched", "by name"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_are_eager_s_up_to_rounding(family, how):
    _assert_no_further_than_eager(family, how, torch.float32, "cpu", MARGIN_32)


@pytest.mark.parametrize("how", ["patched", "by name"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_are_no_further_from_the_truth_than_eager_s(family, how):
    _assert_no_further_than_eager(family, how, torch.bfloat16, "cpu", MARGIN_16)


@pytest.mark.parametrize("how", ["patched", "by name"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_greedy_generation_is_eager_s_token_for_token(family, how):
    tokens = hf_models.prompt()
    expected = _generate(hf_models.build(family), tokens)
    with hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        got = _generate(_served_model(family, how), tokens)
    assert torch.equal(got, expected)
    assert len(set(expected[:, tokens.shape[1] :].flatten().tolist())) > 5, "degenerate generation"
    assert served == _expected_calls(tokens)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("how", ["patched", "by name"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_the_gpu_are_no_further_from_the_truth_than_eager_s(family, how, dtype):
    _assert_no_further_than_eager(family, how, dtype, "cuda", MARGIN_16)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_on_the_gpu_is_served_through_prefill_and_decode(family):
    # On a GPU generate() switches grouped_mm to batched_mm for the decode loop, so that is what is below the patch.
    tokens = hf_models.prompt().cuda()
    model = hf_models.build(family, implementation="grouped_mm").to("cuda", torch.bfloat16)
    with warpdecode.hf.patched(model), hf_models.counted_kernel_calls() as served, hf_models.no_fallback():
        first, second = _generate(model, tokens), _generate(model, tokens)
    assert served == _expected_calls(tokens) * 2
    assert torch.equal(first, second)
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}


NEW_TOKENS = 8


def _generate(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=True
    )


def _expected_calls(tokens: torch.Tensor) -> list[int]:
    """The tokens of each call: every layer once for the prompt, then once for each new token but the last."""
    return [tokens.numel()] * hf_models.MOE_LAYERS + [tokens.shape[0]] * (NEW_TOKENS - 1) * hf_models.MOE_LAYERS
