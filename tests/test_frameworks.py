"""Every framework's arrays go in, the caller's framework comes out, with the same bits."""

import time

import numpy as np
import pytest
import torch

import warpdecode
from cases import make_layer, make_tokens

ml_dtypes = pytest.importorskip("ml_dtypes")

NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def case(dtype, device="cpu", ids=torch.int32):
    """(inputs as torch tensors, expected output) of a small layer."""
    layer = make_layer(8, 96, 64, dtype, device)
    x, topk_ids, weights = make_tokens(layer, 5, 3, id_dtype=ids)
    inputs = (x, topk_ids, weights, layer.gate_up, layer.down)
    return inputs, warpdecode.moe(*inputs)


def to_numpy(tensor):
    """A NumPy array of the same bits; bfloat16 by ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def same_bits(array, tensor):
    """Whether a NumPy array has the bits of a torch tensor."""
    return array.shape == tuple(tensor.shape) and array.tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_numpy(name):
    inputs, expected = case(NAMES[name])
    arrays = [to_numpy(t) for t in inputs]
    found = warpdecode.moe(*arrays)
    assert type(found) is np.ndarray and found.dtype == arrays[0].dtype
    assert same_bits(found, expected)
    out = np.zeros_like(arrays[0])
    assert warpdecode.moe(*arrays, out=out) is out
    assert same_bits(out, expected)


def test_numpy_refusals():
    inputs, _ = case(torch.float32)
    arrays = [to_numpy(t) for t in inputs]
    read_only = np.zeros_like(arrays[0])
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out: was read-only, expected a writable array"):
        warpdecode.moe(*arrays, out=read_only)
    with pytest.raises(ValueError, match=r"hidden_states: strides were \[1, 5\], expected compact"):
        warpdecode.moe(np.asfortranarray(arrays[0]), *arrays[1:])
    packed = np.zeros(arrays[0].shape, [("value", np.float32), ("mark", np.int8)])["value"]
    with pytest.raises(
        ValueError, match=r"hidden_states: strides were \(480, 5\) bytes, expected multiples of the elem"
    ):
        warpdecode.moe(packed, *arrays[1:])
    with pytest.raises(ValueError, match="hidden_states: was big-endian"):
        warpdecode.moe(arrays[0].astype(">f4"), *arrays[1:])
    with pytest.raises(ValueError, match="gate_up_proj: dtype was float64"):
        warpdecode.moe(*arrays[:3], arrays[3].astype(np.float64), arrays[4])
    with pytest.raises(ValueError, match=r"hidden_states: was a builtins.list, expected an array that speaks DLPack"):
        warpdecode.moe(arrays[0].tolist(), *arrays[1:])


@pytest.mark.parametrize("name", NAMES)
def test_numpy_memmap(name, tmp_path):
    inputs, expected = case(NAMES[name])
    x, ids, weights, gate_up, down = (to_numpy(t) for t in inputs)
    mapped = np.memmap(tmp_path / "gate_up", dtype=gate_up.dtype, shape=gate_up.shape, mode="w+")
    mapped[:] = gate_up
    found = warpdecode.moe(x, ids, weights, mapped, down)
    assert type(found) is np.ndarray and same_bits(found, expected)


def test_numpy_subclasses_are_refused():
    """A mask, or a unit, is not in the memory."""
    inputs, _ = case(torch.float32)
    x, ids, weights, gate_up, down = (to_numpy(t) for t in inputs)
    masked = np.ma.array(gate_up, mask=gate_up > 0)
    with pytest.raises(ValueError, match=r"gate_up_proj: was a numpy.ma.*MaskedArray, a subclass of numpy.ndarray"):
        warpdecode.moe(x, ids, weights, masked, down)
    with pytest.raises(ValueError, match=r"expected a plain numpy.ndarray \(masked arrays: filled\(\)"):
        warpdecode.moe(x.view(np.matrix), ids, weights, gate_up, down)


@pytest.mark.gpu
def test_cupy_on_cuda(cuda):
    cupy = pytest.importorskip("cupy")
    inputs, _ = case(torch.float16)
    expected = warpdecode.moe(*(t.cuda() for t in inputs)).cpu()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arrays = [cupy.asarray(to_numpy(t)) for t in inputs]
        found = warpdecode.moe(*arrays)
        assert isinstance(found, cupy.ndarray)
        out = cupy.zeros_like(arrays[0])
        assert warpdecode.moe(*arrays, out=out) is out
        assert same_bits(cupy.asnumpy(found), expected)
        assert same_bits(cupy.asnumpy(out), expected)


class Producer:
    """An array of a framework that nobody knows: DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_any_producer():
    inputs, expected = case(torch.float32)
    out = np.zeros((5, 96), np.float32)
    warpdecode.moe(*(Producer(to_numpy(t)) for t in inputs), out=out)
    assert same_bits(out, expected)
    with pytest.raises(ValueError, match=r"out: must be given for a test_frameworks.Producer"):
        warpdecode.moe(*(Producer(to_numpy(t)) for t in inputs))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: was read-only"):
        warpdecode.moe(*(Producer(to_numpy(t)) for t in inputs), out=Producer(out))


def test_arrays_are_let_go():
    """Experts keeps no input of a past call alive."""
    import weakref

    inputs, _ = case(torch.float32)
    arrays = [to_numpy(t) for t in inputs]
    experts = warpdecode.Experts(*arrays[3:])
    hidden = Producer(arrays[0].copy())
    memory = weakref.ref(hidden.array)
    experts(hidden, *arrays[1:3], out=np.zeros_like(arrays[0]))
    del hidden
    assert memory() is None


def test_pool_outlives_a_call_that_uses_it():
    """set_num_threads while other threads are in calls: the old pool ends after them."""
    from concurrent.futures import ThreadPoolExecutor

    layer = make_layer(8, 1536, 512, torch.bfloat16)
    inputs = make_tokens(layer, 4, 4)
    experts = warpdecode.Experts(layer.gate_up, layer.down)
    expected, before = experts(*inputs), warpdecode.get_num_threads()
    try:
        with ThreadPoolExecutor(4) as executor:
            calls = [executor.submit(experts, *inputs) for _ in range(60)]
            for count in (1, 3, 2, 4, 2):
                warpdecode.set_num_threads(count)
            assert all(torch.equal(call.result(), expected) for call in calls)
    finally:
        warpdecode.set_num_threads(before)


def test_torch_refusals():
    (x, ids, weights, gate_up, down), _ = case(torch.bfloat16)
    with pytest.raises(ValueError, match="hidden_states: requires a gradient"):
        warpdecode.moe(x.clone().requires_grad_(), ids, weights, gate_up, down)
    with pytest.raises(ValueError, match="gate_up_proj: requires a gradient"):
        warpdecode.moe(x, ids, weights, torch.nn.Parameter(gate_up), down)
    trained = warpdecode.Experts(gate_up, torch.nn.Parameter(down))
    with pytest.raises(ValueError, match="down_proj: requires a gradient"):
        warpdecode.moe_gate_up_3d_batched(trained, x, ids)
    with torch.no_grad():
        inter = warpdecode.moe_gate_up_3d_batched(trained, x, ids)
        warpdecode.moe(x, ids, weights, torch.nn.Parameter(gate_up), down)
    with pytest.raises(ValueError, match="topk_weights: requires a gradient"):
        warpdecode.moe_down_3d_batched(warpdecode.Experts(gate_up, down), inter, ids, weights.requires_grad_())
    weights = weights.detach()
    with pytest.raises(ValueError, match="hidden_states: was on meta"):
        warpdecode.moe(x.to("meta"), ids, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"subclass of torch.Tensor"):
        warpdecode.moe(torch.Tensor._make_subclass(type("Sub", (torch.Tensor,), {}), x), ids, weights, gate_up, down)
    with pytest.raises(ValueError, match="activation: was 'tanh', expected one of 'silu', 'gelu_tanh'"):
        warpdecode.moe(x, ids, weights, gate_up, down, activation="tanh")


def test_parameter_data_replaced_is_seen():
    """An RL step may give a parameter new memory: the old must neither be read nor be freed under a running call."""
    (x, ids, weights, gate_up, down), _ = case(torch.bfloat16)
    parameter = torch.nn.Parameter(gate_up)
    with torch.no_grad():
        experts = warpdecode.Experts(parameter, down)
        experts(x, ids, weights)
        parameter.data = gate_up * 2
        assert torch.equal(experts(x, ids, weights), warpdecode.moe(x, ids, weights, gate_up * 2, down))


@pytest.mark.gpu
def test_current_stream_on_cuda(cuda):
    """The caller's current stream, not the default one: work queued behind a long wait sees what came before it."""
    inputs, _ = case(torch.bfloat16)
    on_gpu = [t.to(cuda) for t in inputs]
    expected = warpdecode.moe(on_gpu[0] * 2, *on_gpu[1:])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second on this stream alone
        doubled = on_gpu[0] * 2
        found = warpdecode.moe(doubled, *on_gpu[1:])
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_current_device_is_restored_on_cuda(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("gpu: needs two CUDA devices")
    inputs, _ = case(torch.bfloat16)
    first = warpdecode.moe(*(t.to("cuda:0") for t in inputs))
    with torch.cuda.device(0):
        second = warpdecode.moe(*(t.to("cuda:1") for t in inputs))
        assert torch.cuda.current_device() == 0 and second.device.index == 1
    assert torch.equal(first.cpu(), second.cpu())
    with pytest.raises(ValueError, match="hidden_states: was on cuda:1, expected cuda:0 as gate_up_proj"):
        warpdecode.moe(inputs[0].to("cuda:1"), *(t.to("cuda:0") for t in inputs[1:]))


def test_cuda_tensor_without_cuda():
    """Where CUDA cannot be used, the reason is a sentence that says what to do."""
    usable, reason = warpdecode.cuda_usable()
    if usable:
        pytest.skip("CUDA is usable here")
    assert reason.startswith("CUDA: ") and ("driver" in reason or "CPU-only" in reason)


def _thread_time(function):
    """The least thread CPU time of a call, so that a busy machine does not count."""
    rounds = []
    for _ in range(30):
        start = time.thread_time()
        for _ in range(500):
            function()
        rounds.append((time.thread_time() - start) / 500)
    return min(rounds)


class Counter:
    """What Python itself takes its time for: a method that does nothing."""

    def method(self, one, two, three):
        return one

    def hundred_calls(self):
        for number in range(100):
            self.method(number, 1, 2)


def test_call_overhead():
    """A call without its kernels (T = 0) takes less than 300 calls of a Python method, on a slow processor, too: 10 us
    where it takes 6.5."""
    layer = make_layer(8, 64, 32, torch.bfloat16)
    call = warpdecode.Experts(layer.gate_up, layer.down)
    inputs = make_tokens(layer, 0, 2)
    with torch.no_grad():
        ours, pythons = _thread_time(lambda: call(*inputs)), _thread_time(Counter().hundred_calls)
    assert ours < 3 * pythons, f"{ours * 1e6:.1f} us, and {pythons * 1e6:.1f} us for 100 calls of a method"
