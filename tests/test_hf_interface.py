"""transformers' implementations of the experts, one after another on one loaded model: what its own test suite asks of
each implementation, asked of ours."""

from contextlib import contextmanager

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import cases
import hf_models
import hf_support
import warpdecode.hf

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm", "warp_decode"]


@contextmanager
def _calls():
    """Yields a list of the names of the registered implementations that are called, which still run."""
    registry = type(ALL_EXPERTS_FUNCTIONS)._global_mapping
    before = dict(registry)
    called = []

    def spy(name, function):
        def spied(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        return spied

    registry.update({name: spy(name, function) for name, function in before.items()})
    try:
        yield called
    finally:
        registry.clear()
        registry.update(before)


def _loaded(family, dtype, device, directory):
    # Saved and loaded, because weights mapped from a file lie at addresses that no allocator would choose.
    model = hf_models.build(family)
    model.to(dtype).save_pretrained(directory)
    return type(model).from_pretrained(directory, dtype=dtype).eval().to(device)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", sorted(hf_models.FAMILIES))
def test_each_implementation_is_the_one_that_runs_and_all_agree(family, dtype, device, tmp_path):
    if (device, dtype) == ("cuda", torch.float32):
        pytest.skip("float32 weights are served on the CPU alone")
    warpdecode.hf.register()
    model = _loaded(family, dtype, device, tmp_path)
    tokens = hf_models.prompt().to(device)
    seen = {}

    def keep_the_first(module, inputs):
        seen.setdefault(module, inputs)

    hooks = [m.register_forward_pre_hook(keep_the_first) for m in hf_models.experts_modules(model)]
    with hf_models.no_fallback():
        for name in IMPLEMENTATIONS:
            model.set_experts_implementation(name)
            with _calls() as called:
                assert torch.isfinite(model(tokens).logits).all()
            assert called == ([] if name == "eager" else [name] * hf_models.MOE_LAYERS)
    for hook in hooks:
        hook.remove()
    # On the inputs that the first run gave each layer, so that no token is routed differently.
    assert len(seen) == hf_models.MOE_LAYERS
    for module, inputs in seen.items():
        outputs = {}
        for name in IMPLEMENTATIONS:
            model.set_experts_implementation(name)
            outputs[name] = module(*inputs)
        model.set_experts_implementation("eager")
        exact = module.double()(inputs[0].double(), inputs[1], inputs[2].double()).cpu()
        bound = cases.error_bound(exact, dtype)
        for name, output in outputs.items():
            allowed = bound if name == "warp_decode" else hf_support.EAGER_ROUNDINGS * bound
            assert cases.relative_error(output, exact) <= allowed, name
        assert outputs["warp_decode"].dtype == outputs["eager"].dtype
