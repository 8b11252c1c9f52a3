"""torch.compile gets the kernels as one operator; torch.jit and torch.export, which cannot, the model's own path."""

import json
from contextlib import ExitStack

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

import cases
import hf_models
import warpdecode.hf
from warpdecode.description import ACTIVATIONS
from warpdecode.hf import WarpDecodeFallbackError, WarpDecodeFallbackWarning
from warpdecode.hf.layer import cuda_serves


@pytest.fixture
def graphs():
    """A backend of torch.compile that runs graphs as they are, and lists them."""
    torch._dynamo.reset()

    def backend(graph, _):
        backend.seen.append(graph)
        return graph.forward

    backend.seen = []
    yield backend
    torch._dynamo.reset()


def _operators(graph) -> int:
    return sum(node.target is torch.ops.warpdecode.experts.default for node in graph.graph.nodes)


HOW = ["patched", "by name", "accelerated"]


@pytest.fixture(params=HOW)
def layer(request):
    """A layer that is told to use the kernels in one of the three ways."""
    warpdecode.hf.register()
    if request.param == "patched":
        yield warpdecode.hf.patch(hf_models.experts_layer(), strict=True)
    elif request.param == "by name":
        yield hf_models.experts_layer("warp_decode")
    else:
        with warpdecode.hf.accelerate_decode(strict=True):
            yield hf_models.experts_layer("batched_mm")


@torch.no_grad()
@pytest.mark.parametrize("ran_before", [False, True], ids=["cold", "ran before"])
def test_a_compiled_layer_runs_the_kernels_in_one_graph(layer, graphs, ran_before):
    inputs = hf_models.layer_inputs()
    with hf_models.no_fallback(), hf_models.counted_kernel_calls() as served:
        if ran_before:
            layer(*inputs)
        compiled = torch.compile(layer, backend=graphs, fullgraph=True)
        got = compiled(*inputs), compiled(*inputs)
        assert len(served) == 2 + ran_before
        expected = layer(*inputs)
    assert all(torch.equal(output, expected) for output in got)
    assert [_operators(graph) for graph in graphs.seen] == [1]


@torch.no_grad()
def test_a_compiled_layer_serves_all_layers_of_a_patched_model(graphs):
    # Regional compilation: every layer runs the code that the first one was compiled to.
    layers = torch.nn.ModuleList([hf_models.experts_layer() for _ in range(12)])
    hf_models.randomise(layers)
    warpdecode.hf.patch(layers, strict=True)
    inputs = hf_models.layer_inputs()
    outputs = [torch.compile(layer, backend=graphs, fullgraph=True)(*inputs) for layer in layers]
    assert all(torch.equal(output, layer(*inputs)) for output, layer in zip(outputs, layers, strict=True))
    assert len(graphs.seen) == 1


@torch.no_grad()
def test_compiled_code_sees_new_weights_and_gates(layer, graphs):
    inputs = hf_models.layer_inputs()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    outputs = [compiled(*inputs)]
    layer.down_proj.mul_(-2)
    outputs.append(compiled(*inputs))
    layer.gate_up_proj.data = layer.gate_up_proj.data.flip(1)
    outputs.append(compiled(*inputs))
    assert torch.equal(outputs[1], -2 * outputs[0])
    assert torch.equal(outputs[2], layer(*inputs)) and not torch.allclose(outputs[1], outputs[2])


@torch.no_grad()
def test_it_serves_any_number_of_tokens_with_dynamic_shapes(layer, graphs):
    compiled = torch.compile(layer, backend=graphs, fullgraph=True, dynamic=True)
    for tokens in (5, 7, 2, 31):
        inputs = hf_models.layer_inputs(tokens)
        assert torch.equal(compiled(*inputs), layer(*inputs))


def _needs_gradients(layer):
    layer.requires_grad_(True)


def _of_another_dtype(layer):
    layer.to(torch.bfloat16)


REFUSED = {
    "gradients": (_needs_gradients, "gradients are needed"),
    "another dtype": (_of_another_dtype, "hidden_states is torch.float32"),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_takes_the_model_s_own_path_in_the_graph(how, case, graphs):
    change, pattern = REFUSED[case]
    warpdecode.hf.register()
    own = "batched_mm" if how == "accelerated" else "grouped_mm"
    layer = hf_models.experts_layer("warp_decode" if how == "by name" else own)
    inputs = hf_models.layer_inputs()
    change(layer)
    other = hf_models.experts_layer(own)
    change(other)
    try:
        expected = other(*inputs)
    except RuntimeError:  # another dtype: the own path refuses it, too
        expected = None
    if how == "patched":
        warpdecode.hf.patch(layer)
    acceleration = warpdecode.hf.accelerate_decode() if how == "accelerated" else None
    try:
        compiled = torch.compile(layer, backend=graphs, fullgraph=True)
        with hf_models.counted_kernel_calls() as served, pytest.warns(WarpDecodeFallbackWarning, match=pattern):
            if expected is None:
                with pytest.raises(RuntimeError):
                    compiled(*inputs)
            else:
                assert torch.allclose(compiled(*inputs), expected, rtol=1e-5, atol=1e-5)
        assert not served
    finally:
        if acceleration is not None:
            acceleration.undo()


def test_it_raises_under_strict(graphs):
    layer = warpdecode.hf.patch(hf_models.experts_layer(), strict=True)
    layer.requires_grad_(True)
    with pytest.raises(WarpDecodeFallbackError, match="Qwen3MoeExperts cannot be served: gradients are needed"):
        torch.compile(layer, backend=graphs)(*hf_models.layer_inputs())


@torch.no_grad()
def test_a_layer_that_can_never_be_served_says_so_when_compiled_by_name(graphs):
    warpdecode.hf.register()
    layer = hf_models.experts_layer("warp_decode", hidden_act="tanh")
    with pytest.warns(WarpDecodeFallbackWarning, match="none of the known"):
        got = torch.compile(layer, backend=graphs, fullgraph=True)(*hf_models.layer_inputs())
    expected = hf_models.experts_layer("grouped_mm", hidden_act="tanh")(*hf_models.layer_inputs())
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ran_before", [False, True], ids=["cold", "ran before"])
def test_weights_that_the_library_refuses_take_the_model_s_own_path(graphs, ran_before):
    # float64 and a hidden size of 60: the library says so when it describes them, which tracing must not miss.
    layer = warpdecode.hf.patch(hf_models.experts_layer("batched_mm"))
    hidden, ids, weights = hf_models.layer_inputs()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    if ran_before:
        compiled(hidden, ids, weights)
    layer.double()
    with pytest.warns(WarpDecodeFallbackWarning, match="float64"):
        got = compiled(hidden.double(), ids, weights.double())
    assert torch.allclose(got, layer(hidden.double(), ids, weights.double()))
    layer.float()
    layer.gate_up_proj.data = layer.gate_up_proj.data[..., :60].contiguous()
    layer.down_proj.data = layer.down_proj.data[:, :60].contiguous()
    with pytest.warns(WarpDecodeFallbackWarning, match="60"):
        compiled(hidden[:, :60].contiguous(), ids, weights)


@torch.no_grad()
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_operator_keeps_torch_s_rules(dtype, activation, device):
    layer = cases.make_layer(4, 64, 40, dtype, device)
    hidden, ids, weights = cases.make_tokens(layer, 5, 2)
    parts = [["gate_up_proj", 0, None, None], ["down_proj", 1, None, None]]
    description = json.dumps({"parts": parts, "arguments": {"activation": activation}})
    for arguments in (
        (hidden, ids, weights),
        (hidden[:0], ids[:0], weights[:0]),
        (hidden, ids.int(), weights.to(dtype)),
    ):
        torch.library.opcheck(
            torch.ops.warpdecode.experts.default, (*arguments, [layer.gate_up, layer.down], description)
        )
    strided = hidden.t().contiguous().t()
    operator = torch.ops.warpdecode.experts
    got = operator(strided, ids, weights, [layer.gate_up, layer.down], description)
    assert got.is_contiguous()
    assert torch.equal(got, operator(hidden, ids, weights, [layer.gate_up, layer.down], description))


# ---- generate()


def _generate(model, tokens, **kwargs):
    config = CompileConfig(fullgraph=True, **kwargs)
    config._compile_all_devices = True  # transformers compiles on GPUs alone, otherwise
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=6,
        cache_implementation="static", compile_config=config,
    )  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_generate_with_a_static_cache_compiles_without_a_graph_break(family, how, graphs):
    warpdecode.hf.register()
    tokens = hf_models.prompt()
    # On the CPU generate() does not switch to batched_mm by itself.
    names = {"patched": "grouped_mm", "by name": "warp_decode", "accelerated": "batched_mm"}
    model = hf_models.build(family, implementation=names[how])
    reference = hf_models.build(family)
    expected = reference.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=6)
    if how == "patched":
        warpdecode.hf.patch(model, strict=True)
    acceleration = warpdecode.hf.accelerate_decode(strict=True) if how == "accelerated" else None
    try:
        with hf_models.no_fallback(), hf_models.counted_kernel_calls() as served:
            got = _generate(model, tokens, backend=graphs, mode=None)
    finally:
        if acceleration is not None:
            acceleration.undo()
    assert torch.equal(got, expected)
    assert served == [tokens.numel()] * hf_models.MOE_LAYERS + [tokens.shape[0]] * 5 * hf_models.MOE_LAYERS
    assert graphs.seen and all(_operators(graph) == hf_models.MOE_LAYERS for graph in graphs.seen)


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOW)
def test_generate_with_a_static_cache_on_the_gpu(how, cuda):
    # transformers' own choice there: inductor, and CUDA graphs (mode "reduce-overhead").
    warpdecode.hf.register()
    torch._dynamo.reset()
    tokens = hf_models.prompt().to(cuda)
    model = hf_models.build("qwen3_moe", implementation="warp_decode" if how == "by name" else "grouped_mm")
    model.to(cuda, torch.bfloat16)
    if how == "patched":
        warpdecode.hf.patch(model, strict=True)
    acceleration = warpdecode.hf.accelerate_decode(strict=True) if how == "accelerated" else None
    try:
        with hf_models.no_fallback(), hf_models.counted_kernel_calls() as served:
            first, second = _generate(model, tokens), _generate(model, tokens)
    finally:
        if acceleration is not None:
            acceleration.undo()
        torch._dynamo.reset()
    assert served and torch.equal(first, second)


@torch.no_grad()
@pytest.mark.usefixtures("graphs")
def test_inductor_runs_the_operator_with_the_same_bits(layer, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer.to(device, dtype)
    inputs = [t.to(device) for t in hf_models.layer_inputs(dtype=dtype)]
    expected = layer(*inputs)
    with hf_models.counted_kernel_calls() as served:
        assert torch.equal(torch.compile(layer, fullgraph=True)(*inputs), expected)
    assert served


@pytest.mark.parametrize(
    ("how", "device"),
    [("patched", "cpu"), *(pytest.param(how, "cuda", marks=pytest.mark.gpu) for how in HOW)],  # it starts slowly
)
def test_continuous_batching(how, device):
    warpdecode.hf.register()
    names = {"patched": "grouped_mm", "by name": "warp_decode", "accelerated": "batched_mm"}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    prompts = [row[: 3 + i].tolist() for i, row in enumerate(hf_models.prompt())]  # of different lengths
    model = hf_models.build("qwen3_moe", implementation=names[how]).to(device, dtype)
    if how == "patched":
        warpdecode.hf.patch(model, strict=True)
    with ExitStack() as stack:
        if how == "accelerated":
            stack.enter_context(warpdecode.hf.accelerate_decode(strict=True))
        stack.enter_context(hf_models.no_fallback())
        served = stack.enter_context(hf_models.counted_kernel_calls())
        got = _generate_batch(model, prompts)
        assert got == _generate_batch(model, prompts)
    assert served
    if device == "cpu":  # in FP32 the own path gives the same tokens
        assert got == _generate_batch(hf_models.build("qwen3_moe", implementation="grouped_mm"), prompts)


def _generate_batch(model, prompts) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(inputs=prompts, generation_config=config)
    tokens = [results[key].generated_tokens for key in sorted(results, key=lambda key: int(key.split("_")[-1]))]
    assert len(tokens) == len(prompts) and all(len(row) == 5 for row in tokens)
    return tokens


def test_whether_cuda_is_usable_can_be_asked_while_tracing():
    # Asked for weights on CUDA alone, and so never by the tests that run without a GPU.
    expected = 2.0 if warpdecode.cuda_usable()[0] else 3.0
    asked = torch.compile(lambda x: x + (1 if cuda_serves()[0] else 2), fullgraph=True, backend="eager")
    assert asked(torch.ones(1)).item() == expected


# ---- what cannot hold the operator


@torch.no_grad()
def test_torch_jit_trace_records_the_model_s_own_path():
    layer = warpdecode.hf.patch(hf_models.experts_layer())
    hidden, ids, weights = hf_models.layer_inputs()
    with pytest.warns(WarpDecodeFallbackWarning, match=r"torch\.jit"):
        traced = torch.jit.trace(lambda h: layer(h, ids, weights), hidden, check_trace=False)
    other = hidden.roll(1, 0) * 2
    assert torch.allclose(traced(other), layer(other, ids, weights), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_torch_export_records_the_model_s_own_path(strict):
    layer = warpdecode.hf.patch(hf_models.experts_layer("batched_mm"))
    inputs = hf_models.layer_inputs()
    with pytest.warns(WarpDecodeFallbackWarning, match=r"torch\.export"):
        program = torch.export.export(layer, inputs, strict=strict)
    assert "warpdecode" not in str(program.graph)
    assert torch.allclose(program.module()(*inputs), layer(*inputs), rtol=1e-4, atol=1e-4)
    warpdecode.hf.patch(layer, strict=True)
    with pytest.raises((WarpDecodeFallbackError, RuntimeError), match=r"torch\.export"):
        torch.export.export(layer, inputs, strict=strict)
