"""Small random models, and single modules, whose experts are outside transformers' experts interface."""

import pytest
import torch

import cases
import hf_models
import warpdecode.hf

# What the library serves where; float32 is the CPU's.
EVERYWHERE = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param(device, dtype, id=f"{device}-{name}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device, names in (("cpu", ("float32", "bfloat16", "float16")), ("cuda", ("bfloat16", "float16")))
        for name in names
        for dtype in [getattr(torch, name)]
    ],
)

# The own forward rounds each of some eight values where the kernels round one.
OWN_ROUNDINGS = 8

_COMMON = {**hf_models._COMMON, "eos_token_id": None}


def _llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM, Llama4TextConfig(
        **_COMMON, head_dim=16, intermediate_size=48, intermediate_size_mlp=64, num_local_experts=8,
        num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=32,
    )  # fmt: skip


def _dbrx():
    from transformers import DbrxConfig, DbrxForCausalLM

    return DbrxForCausalLM, DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=hf_models.VOCAB, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 64},
    )  # fmt: skip


def _longcat_flash():
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    fields = _COMMON | {"num_key_value_heads": 4, "num_hidden_layers": 1}
    fields.pop("num_hidden_layers")
    return LongcatFlashForCausalLM, LongcatFlashConfig(
        **fields, num_layers=2, ffn_hidden_size=64, expert_ffn_hidden_size=40, n_routed_experts=8, zero_expert_num=4,
        moe_topk=3, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
        head_dim=8,
    )  # fmt: skip


MODELS = {"llama4": _llama4, "dbrx": _dbrx, "longcat_flash": _longcat_flash}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """The family's model on the CPU, in eval mode, without gradients."""
    model_class, config = MODELS[family]()
    torch.manual_seed(seed)
    model = model_class(config).eval().requires_grad_(False)
    hf_models.randomise(model)
    return model.to(dtype)


def class_of(family: str, name: str) -> type:
    """A class of transformers; the test is skipped where the installed release lacks it."""
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name, None) or pytest.skip(f"this transformers has no {name}")


def output(result) -> torch.Tensor:
    """A block's output, without what it returns besides."""
    return result[0] if isinstance(result, tuple) else result


def assert_alike(got, own) -> None:
    """What the kernels gave is what the own forward gave, but for roundings. That has the dtype's numbers, so what
    rounding it costs does not show in it: half an eps at most."""
    got, own = output(got), output(own)
    assert (got.shape, got.dtype, got.device) == (own.shape, own.dtype, own.device)
    expected = own.double().cpu()
    bound = cases.error_bound(expected, own.dtype) + torch.finfo(own.dtype).eps / 2
    assert cases.relative_error(got, expected) <= OWN_ROUNDINGS * bound


def check_on_the_gpu(model: torch.nn.Module) -> None:
    """The bfloat16 model's layers, each on what a forward of the model's own brings it, and generation."""
    model, tokens = model.cuda(), hf_models.prompt().cuda()
    calls = _recorded(model, lambda: model(tokens))
    assert len(calls) == hf_models.MOE_LAYERS
    warpdecode.hf.patch(model, strict=True)
    for module, args, own in calls:
        with hf_models.counted_kernel_calls() as served:
            assert_alike(module(*args), own)
        assert served == [tokens.numel()]
    assert {(row.path, row.device) for row in warpdecode.hf.explain(model)} == {("warp_decode", "cuda:0")}
    with hf_models.counted_kernel_calls() as served:
        first, second = (model.generate(tokens, max_new_tokens=6, do_sample=False) for _ in range(2))
    assert len(served) == 2 * 6 * hf_models.MOE_LAYERS and torch.equal(first, second)
    with hf_models.counted_kernel_calls() as served:
        warpdecode.hf.unpatch(model)(tokens)
    assert not served


def _recorded(model: torch.nn.Module, run) -> list[tuple]:
    """(module, arguments, result) of each call, while `run()`, of the modules that a patch of the model replaces."""
    with warpdecode.hf.patched(model, strict=True):
        modules = [module for module in model.modules() if "_warpdecode_policy" in module.__dict__]
    calls = []
    hooks = [module.register_forward_hook(lambda *call: calls.append(call)) for module in modules]
    run()
    for hook in hooks:
        hook.remove()
    return calls
