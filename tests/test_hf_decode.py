"""accelerate_decode(): the kernels in the place of transformers' batched_mm."""

import subprocess
import sys
import warnings

import pytest
import torch
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

import hf_models
import warpdecode.hf
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning

REGISTRIES = (ExpertsInterface, type(ALL_FP8_EXPERTS_FUNCTIONS))


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = [dict(registry._global_mapping) for registry in REGISTRIES]
    yield
    after = [registry._global_mapping for registry in REGISTRIES]
    for old, new in zip(before, after, strict=True):
        assert new["batched_mm"] is old["batched_mm"]


def _model(implementation="batched_mm", family="qwen3_moe"):
    return hf_models.build(family, implementation=implementation)


@torch.no_grad()
def _served(model) -> int:
    with hf_models.counted_kernel_calls() as served:
        model(hf_models.prompt())
    return len(served)


def test_batched_mm_is_served_and_nothing_else():
    models = {name: _model(name) for name in ("batched_mm", "grouped_mm", "eager")}
    with warpdecode.hf.accelerate_decode(), hf_models.no_fallback():
        assert [_served(model) for model in models.values()] == [hf_models.MOE_LAYERS, 0, 0]
    assert [_served(model) for model in models.values()] == [0, 0, 0]


@pytest.mark.parametrize("family", sorted(hf_models.FAMILIES))
def test_it_gives_the_bits_that_a_patch_gives(family):
    model, patched = _model(family=family), warpdecode.hf.patch(_model(family=family))
    with torch.no_grad(), warpdecode.hf.accelerate_decode(strict=True):
        assert torch.equal(model(hf_models.prompt()).logits, patched(hf_models.prompt()).logits)


def test_generate_s_switch_brings_it_in():
    # What transformers' generate() does around the decode loop; by itself it does so on a GPU alone.
    model = _model("grouped_mm")
    tokens = hf_models.prompt()
    with warpdecode.hf.accelerate_decode(strict=True), torch.no_grad(), hf_models.counted_kernel_calls() as served:
        model(tokens)
        assert not served
        original = model.get_experts_implementation()
        model.set_experts_implementation({k: "batched_mm" for k in original})
        model(tokens[:, :1])
        assert served == [tokens.shape[0]] * hf_models.MOE_LAYERS
        model.set_experts_implementation(original)


@pytest.mark.gpu
@pytest.mark.parametrize("family", sorted(hf_models.FAMILIES))
def test_generate_on_the_gpu_is_served_from_the_second_token_on(family, cuda):
    model = _model("grouped_mm", family).to(cuda, torch.bfloat16)
    tokens = hf_models.prompt().to(cuda)
    with warpdecode.hf.accelerate_decode(strict=True), hf_models.counted_kernel_calls() as served:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=5)
    assert served == [tokens.shape[0]] * hf_models.MOE_LAYERS * 4
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}


def test_what_cannot_be_served_goes_to_batched_mm_and_is_said_once_per_model():
    expected = _model()(hf_models.prompt()).logits
    with warpdecode.hf.accelerate_decode():
        for _ in range(2):
            model = _model()
            with pytest.warns(WarpDecodeFallbackWarning, match=r"own path \(batched_mm\).*gradients") as said:
                first, second = (model(hf_models.prompt()).logits for _ in range(2))
            assert len(said) == 1
            assert torch.equal(first, expected) and torch.equal(second, expected) and first.requires_grad
    with warpdecode.hf.accelerate_decode(strict=True), pytest.raises(WarpDecodeFallbackError, match="gradients"):
        model(hf_models.prompt())
    with hf_models.no_fallback():
        model(hf_models.prompt())


def test_calling_it_again_changes_strict_and_nothing_else():
    model = _model()
    handles = [warpdecode.hf.accelerate_decode(strict=strict) for strict in (False, True, True)]
    with pytest.raises(WarpDecodeFallbackError):
        model(hf_models.prompt())
    warpdecode.hf.accelerate_decode()
    with pytest.warns(WarpDecodeFallbackWarning):
        model(hf_models.prompt())
    assert repr(handles[0]).endswith("on>")
    handles[0].undo()  # any of them: there is one acceleration
    assert _served(model) == 0
    for handle in handles:
        handle.undo()
    assert _served(model) == 0 and repr(handles[0]).endswith("off>")


def test_a_scope_ends_with_what_was_before_it():
    model = _model()
    outer = warpdecode.hf.accelerate_decode(strict=True)
    with pytest.raises(KeyError), warpdecode.hf.accelerate_decode():
        with pytest.warns(WarpDecodeFallbackWarning):
            model(hf_models.prompt())
        raise KeyError
    with pytest.raises(WarpDecodeFallbackError):
        model(hf_models.prompt())
    outer.undo()


def test_handles_that_end_in_another_order_and_twice():
    model = _model()
    first, second = warpdecode.hf.accelerate_decode(), warpdecode.hf.accelerate_decode()
    first.__exit__()
    assert _served(model)
    second.__exit__()
    assert not _served(model)
    with pytest.raises(RuntimeError, match=r"this acceleration has ended; call accelerate_decode\(\) again"), first:
        pass


def test_explain_sees_another_batched_mm_on_the_interface_itself():
    model = _model().requires_grad_(False)
    with warpdecode.hf.accelerate_decode():
        ALL_EXPERTS_FUNCTIONS["batched_mm"] = lambda *call: None
        try:
            row = warpdecode.hf.explain(model)[0]
        finally:
            del ALL_EXPERTS_FUNCTIONS["batched_mm"]
    assert row.path == "batched_mm" and "another batched_mm set on itself" in row.reason


def test_what_somebody_else_registered_meanwhile_is_left_alone():
    def theirs(*args):
        raise AssertionError

    registry = ExpertsInterface._global_mapping
    original = registry["batched_mm"]
    handle = warpdecode.hf.accelerate_decode()
    registry["batched_mm"] = theirs
    handle.undo()
    assert registry["batched_mm"] is theirs
    registry["batched_mm"] = original


def test_a_patched_model_s_own_path_is_the_original_batched_mm():
    model = warpdecode.hf.patch(_model())
    with warpdecode.hf.accelerate_decode(), pytest.warns(WarpDecodeFallbackWarning) as said:
        model(hf_models.prompt())  # needs gradients
    assert len(said) == 1


def test_fp8_experts_go_to_their_own_batched_mm():
    model = hf_models.fp8("batched_mm")
    experts = hf_models.experts_modules(model)[0]
    registry = type(ALL_FP8_EXPERTS_FUNCTIONS)._global_mapping
    ran, own = [], registry["batched_mm"]
    registry["batched_mm"] = lambda self, *inputs: ran.append(self)  # Triton and a GPU otherwise
    try:
        with warpdecode.hf.accelerate_decode():
            with pytest.warns(WarpDecodeFallbackWarning, match=r"FP8Experts .*\(batched_mm\).*block-scaled FP8"):
                experts(*hf_models.layer_inputs())
            with hf_models.no_fallback():
                experts(*hf_models.layer_inputs())
        with warpdecode.hf.accelerate_decode(strict=True), pytest.raises(WarpDecodeFallbackError, match="FP8"):
            experts(*hf_models.layer_inputs())
    finally:
        registry["batched_mm"] = own
    assert ran == [experts, experts]


def test_explain_says_what_it_does():
    rows = []
    for name in ("batched_mm", "grouped_mm"):
        model = _model(name).requires_grad_(False)
        with warpdecode.hf.accelerate_decode():
            rows.append(warpdecode.hf.explain(model)[0])
    assert (rows[0].path, rows[0].reason) == ("warp_decode", "accelerate_decode() takes the place of batched_mm")
    assert rows[1].path == "grouped_mm" and "to which generate() may switch it" in rows[1].reason


def test_registered_by_name_transformers_knows_only_one_of_us():
    warpdecode.hf.register()
    with warpdecode.hf.accelerate_decode():
        assert "warp_decode" in ALL_EXPERTS_FUNCTIONS and "batched_mm" in ALL_EXPERTS_FUNCTIONS
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _served(_model("warp_decode")) == hf_models.MOE_LAYERS


def test_transformers_is_imported_when_it_is_needed():
    code = (
        "import sys, warpdecode; assert not {'torch', 'transformers'} & sys.modules.keys();"
        "warpdecode.hf.accelerate_decode(); assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_transformers_before_5_7_is_told_that_it_takes_no_names_of_others(monkeypatch):
    # Its list of names is fixed; what `patch` and `accelerate_decode` need, it has.
    monkeypatch.setattr("warpdecode.hf.forward.NAMES_ARE_OPEN", False)
    with pytest.raises(RuntimeError, match=r"accepts no experts implementation but its own by name; 5\.7"):
        warpdecode.hf.register()
    assert _served(warpdecode.hf.patch(_model())) == hf_models.MOE_LAYERS
