"""jax.Arrays: the output's bits and place, what is refused, and the order of work on CUDA."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("jax")

import jax

import warpdecode
from test_frameworks import NAMES, case, same_bits, to_numpy


@pytest.mark.parametrize("name", NAMES)
def test_jax(name):
    inputs, expected = case(NAMES[name])
    cpu = jax.devices("cpu")[0]
    arrays = [jax.device_put(to_numpy(t), cpu) for t in inputs]
    found = warpdecode.moe(*arrays)
    assert isinstance(found, jax.Array)
    assert same_bits(np.asarray(found), expected)
    with pytest.raises(ValueError, match=r"out: was a jax.Array, which is immutable"):
        warpdecode.moe(*arrays, out=arrays[0])
    with pytest.raises(ValueError, match="tracer"):
        jax.jit(lambda x: warpdecode.moe(x, *arrays[1:]))(arrays[0])


ELSEWHERE = """
import jax, numpy as np, warpdecode
first, second = jax.devices("cpu")
x, gate_up, down = (np.ones(shape, np.float32) for shape in ((3, 8), (2, 16, 8), (2, 8, 8)))
arrays = [x, np.zeros((3, 1), np.int32), np.ones((3, 1), np.float32), gate_up, down]
there = warpdecode.moe(*(jax.device_put(array, second) for array in arrays))
assert there.devices() == {second} and there.committed
free = warpdecode.moe(*map(jax.numpy.asarray, arrays))
assert not free.committed and (free + there).devices() == {second}
mesh = jax.sharding.Mesh(np.array([first, second]), "d")
split = jax.device_put(arrays[3], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
try:
    warpdecode.Experts(split, arrays[4])
except ValueError as error:
    print(error)
"""


def test_jax_on_another_device():
    """The output is where hidden_states is. JAX makes its devices once, so a process of its own."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "gate_up_proj: was sharded over 2 devices, expected an array on one\n", done.stderr


def test_jax_refusals():
    inputs, _ = case(torch.float32)
    cpu = jax.devices("cpu")[0]
    x, *others = [jax.device_put(to_numpy(t), cpu) for t in inputs]
    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(ValueError, match=r"hidden_states: was a tracer; .* under jax.jit, jax.vmap or jax.grad"):
            transform(lambda x: warpdecode.moe(x, *others).sum())(x)
    gone = x + 1
    gone.delete()
    with pytest.raises(ValueError, match="hidden_states: was deleted or donated"):
        warpdecode.moe(gone, *others)
    with pytest.raises(ValueError, match="topk_weights: gave no DLPack capsule"):
        warpdecode.moe(x, others[0], jax.random.key(0), *others[2:])


@pytest.mark.gpu
def test_jax_on_cuda(cuda):
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("gpu: jax sees no CUDA device")
    inputs, _ = case(torch.bfloat16)
    expected = warpdecode.moe(*(t.cuda() for t in inputs)).cpu()
    arrays = [jax.device_put(to_numpy(t), jax.devices("gpu")[0]) for t in inputs]
    for _ in range(20):
        found = warpdecode.moe(*arrays)
        assert isinstance(found, jax.Array)
        assert same_bits(np.asarray(found), expected)
    # Behind work that JAX has only enqueued: inputs, output and workspace must be ready all the same.
    square = jax.device_put(np.full((8192, 8192), 2.0**-13, np.float32), jax.devices("gpu")[0])
    product = jax.jit(lambda a, b: a @ b)
    product(square, square).block_until_ready()
    for _ in range(5):
        busy = square
        for _ in range(10):
            busy = product(busy, square)
        found = warpdecode.moe(arrays[0] + (busy[0, 0] * 0).astype(arrays[0].dtype), *arrays[1:])
        assert same_bits(np.asarray(found), expected)
