"""Models spread over devices, offloaded, of mixed dtypes, under autocast."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_models
import warpdecode.hf

pytest.importorskip("accelerate")  # transformers needs it for device_map


def _saved(directory):
    hf_models.build("qwen3_moe").save_pretrained(directory)
    return directory


def _load(directory, device_map, dtype, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(directory, device_map=device_map, dtype=dtype, **kwargs)
    return model.eval().requires_grad_(False)


def _map(first, second, rest):
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return {**dict.fromkeys(names, rest), "model.layers.0": first, "model.layers.1": second}


@torch.no_grad()
def _assert_served_and_right(model, directory, dtype) -> None:
    """All layers are served, twice, with what the same weights give on one device."""
    tokens = hf_models.prompt()
    device = model.hf_device_map["model.embed_tokens"]
    whole = warpdecode.hf.patch(_load(directory, {"": device}, dtype), strict=True)
    expected = whole(tokens.to(device)).logits
    with hf_models.counted_kernel_calls() as served:
        for _ in range(2):
            assert torch.equal(model(tokens.to(device)).logits.to(expected.device), expected)
    assert len(served) == 2 * hf_models.MOE_LAYERS


def _kept(model) -> list[bool]:
    """Whether each layer's weights are held by what we keep of it."""
    return [m.__dict__["_warpdecode_layer"].experts is not None for m in hf_models.experts_modules(model)]


def test_a_layer_offloaded_to_disk_is_served_while_it_is_there_and_not_held(tmp_path):
    directory = _saved(tmp_path / "model")
    model = _load(directory, _map("cpu", "disk", "cpu"), torch.float32, offload_folder=tmp_path / "offload")
    rows = warpdecode.hf.explain(model)
    assert [row.device for row in rows] == ["cpu", "meta"]
    assert rows[0].reason == "it is not patched; the kernels can serve it"
    assert rows[1].reason == "it is not patched; offloaded: looked at when a call brings its weights"
    warpdecode.hf.patch(model, strict=True)
    rows = warpdecode.hf.explain(model)
    assert [row.path for row in rows] == ["warp_decode"] * 2
    assert [row.reason for row in rows] == ["patched", "patched; offloaded: looked at when a call brings its weights"]
    _assert_served_and_right(model, directory, torch.float32)
    assert warpdecode.hf.explain(model)[1].reason == "patched; offloaded: a call brings its weights"
    hf_models.experts_modules(model)[1].act_fn = torch.nn.Softsign()
    assert "looked at when a call" in warpdecode.hf.explain(model)[1].reason  # what the last call saw holds no more
    with pytest.raises(warpdecode.hf.WarpDecodeFallbackError):
        model(hf_models.prompt())
    row = warpdecode.hf.explain(model)[1]
    assert row.path != "warp_decode" and "offloaded" not in row.reason, row
    hf_models.experts_modules(model)[1].act_fn = torch.nn.SiLU()
    _assert_served_and_right(model, directory, torch.float32)
    assert _kept(model) == [True, False]
    assert [module.down_proj.device.type for module in hf_models.experts_modules(model)] == ["cpu", "meta"]


def test_a_model_that_is_offloaded_as_a_whole_says_so_when_patched(tmp_path):
    directory = _saved(tmp_path / "model")
    model = _load(directory, _map("disk", "disk", "cpu"), torch.float32, offload_folder=tmp_path / "offload")
    with pytest.raises(warpdecode.hf.WarpDecodeFallbackError, match=r"none of the 2.*meta device"):
        warpdecode.hf.patch(model, strict=True)
    with pytest.warns(warpdecode.hf.WarpDecodeFallbackWarning, match="meta device"):
        warpdecode.hf.patch(model)
    _assert_served_and_right(model, directory, torch.float32)
    assert _kept(model) == [False, False]
    assert "2 of 2 layers take warp_decode" in str(warpdecode.hf.explain(model))


@pytest.mark.gpu
def test_layers_offloaded_to_the_cpu_run_on_the_gpu(tmp_path, cuda):
    directory = _saved(tmp_path / "model")
    model = _load(directory, _map(0, "cpu", 0), torch.bfloat16)
    warpdecode.hf.patch(model, strict=True)
    _assert_served_and_right(model, directory, torch.bfloat16)
    assert _kept(model) == [True, False]


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_layers_on_two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"gpu: needs 2 CUDA devices, found {torch.cuda.device_count()}")
    directory = _saved(tmp_path / "model")
    model = warpdecode.hf.patch(_load(directory, _map(0, 1, 0), torch.bfloat16), strict=True)
    assert [row.device for row in warpdecode.hf.explain(model)] == ["cuda:0", "cuda:1"]
    _assert_served_and_right(model, directory, torch.bfloat16)


@torch.no_grad()
def test_experts_of_another_dtype_than_the_model_s_take_its_own_path():
    # transformers' paths cannot mix dtypes either; what must not happen is an answer from weights read as others.
    model = warpdecode.hf.patch(hf_models.build("qwen3_moe", implementation="batched_mm").to(torch.bfloat16))
    hf_models.experts_modules(model)[1].to(torch.float16)
    said = pytest.warns(warpdecode.hf.WarpDecodeFallbackWarning, match=r"bfloat16.*weights torch\.float16")
    with hf_models.counted_kernel_calls() as served, said, pytest.raises(RuntimeError):
        model(hf_models.prompt())
    assert len(served) == 1


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])  # routing weights in fp32, and in the model's dtype
def test_autocast_to_the_weights_dtype_changes_nothing_for_a_layer(family, device):
    model = hf_models.build(family).to(device, torch.bfloat16)
    calls = []
    for module in hf_models.experts_modules(model):
        module.register_forward_pre_hook(lambda module, inputs: calls.append((module, inputs)))
    with torch.autocast(device, dtype=torch.bfloat16):
        model(hf_models.prompt().to(device))
    assert len(calls) == hf_models.MOE_LAYERS
    warpdecode.hf.patch(model, strict=True)
    for module, (hidden, *routing) in tuple(calls):
        inputs = (hidden.to(torch.bfloat16), *routing)
        expected = module(*inputs)
        with torch.autocast(device, dtype=torch.bfloat16), hf_models.counted_kernel_calls() as served:
            assert torch.equal(module(*inputs), expected)
        assert served


@torch.no_grad()
def test_autocast_to_another_dtype_takes_the_model_s_own_path(device):
    # Autocast asks for products in bfloat16; the kernels would compute with the weights as they are.
    plain, patched = (hf_models.experts_layer("batched_mm").to(device, torch.float16) for _ in range(2))
    warpdecode.hf.patch(patched)
    inputs = [t.to(device) for t in hf_models.layer_inputs(dtype=torch.float16)]
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = plain(*inputs)
        with pytest.warns(warpdecode.hf.WarpDecodeFallbackWarning, match=r"autocast to torch\.bfloat16 is on"):
            assert torch.equal(patched(*inputs), expected)
