"""The object itself: copies, what cannot be assigned, what the two kernels refuse, and the threads that calls share."""

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

import warpdecode
from cases import make_layer, make_tokens
from layouts import describe, draw_parts, draw_tokens


class Module(torch.nn.Module):
    """A module that keeps its Experts."""

    def __init__(self):
        super().__init__()
        layer = make_layer(4, 64, 32, torch.bfloat16)
        self.gate_up, self.down = torch.nn.Parameter(layer.gate_up), torch.nn.Parameter(layer.down)
        self.experts = warpdecode.Experts(self.gate_up, self.down, activation="gelu", kernel="cpu_generic")

    def forward(self, *call):
        return self.experts(*call)


def saved(module):
    """Through a file of torch."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, saved], ids=["copy.deepcopy", "torch.save"])
def test_a_module_is_copied_with_its_experts(copied):
    module = Module()
    call = make_tokens(make_layer(4, 64, 32, torch.bfloat16), 5, 2)
    expected, other = module(*call), copied(module)
    assert torch.equal(other(*call), expected)
    assert other.experts.down_proj is other.down and other.experts.activation == "gelu"
    other.down.mul_(2)  # the copy's experts read the copy's weights
    assert torch.equal(other(*call), expected * 2) and torch.equal(module(*call), expected)


def test_every_keyword_is_in_a_copy():
    parts = draw_parts(3, 72, 88, torch.bfloat16, bias_dtype=torch.float32)
    x, ids, weights = draw_tokens(parts, 7, 2)
    gate = {"alpha": 1.702, "limit": 0.5, "up_offset": 1.0, "clamp_after_activation": True, "weight_on_input": True}
    for layout in ("pointers, separate", "transposed, interleaved"):
        experts = describe(parts, layout, **gate)
        for other in (pickle.loads(pickle.dumps(experts)), copy.copy(experts)):
            assert torch.equal(other(x, ids, weights), experts(x, ids, weights))


def test_what_is_described_cannot_be_assigned():
    experts = Module().experts
    for name in ("gate_up_proj", "down_proj", "activation"):
        with pytest.raises(AttributeError):
            setattr(experts, name, getattr(experts, name))


def test_the_two_kernels_refuse_by_name():
    layer = make_layer(4, 64, 32, torch.float32)
    experts = warpdecode.Experts(layer.gate_up, layer.down)
    x, ids, weights = make_tokens(layer, 3, 2)
    gate_up, down = warpdecode.moe_gate_up_3d_batched, warpdecode.moe_down_3d_batched
    inter = gate_up(experts, x, ids)
    refusals = [
        (gate_up, (layer.gate_up, x, ids), {}, "experts: was a Tensor, expected a warpdecode.Experts"),
        (gate_up, (experts, x.tolist(), ids), {}, "hidden_states: was a builtins.list"),
        (gate_up, (experts, x, ids.tolist()), {}, "topk_ids: was a builtins.list"),
        (gate_up, (experts, x, ids[0]), {}, r"topk_ids: had 1 axes, expected 2: \[T, K\]"),
        (gate_up, (experts, x, ids[None]), {}, r"topk_ids: had 3 axes, expected 2: \[T, K\]"),
        (gate_up, (experts, x[0], ids), {}, "hidden_states: had 1 axes"),
        (gate_up, (experts, x, ids), {"out": inter[:1].clone()}, r"out: shape was \[1, 2, 1, 32\]"),
        (down, (None, inter, ids, weights), {}, "experts: was a NoneType"),
        (down, (experts, inter.tolist(), ids, weights), {}, "intermediate: was a builtins.list"),
        (down, (experts, inter.sum(), ids, weights), {}, "intermediate: had 0 axes"),
        (down, (experts, inter, ids, weights[0]), {}, "topk_weights: had 1 axes"),
        (down, (experts, inter, ids, weights), {"out": x[:, :8].clone()}, r"out: shape was \[3, 8\]"),
        (experts, (x, ids, weights), {"out": x[:1].clone()}, r"out: shape was \[1, 64\]"),
    ]
    for function, arguments, keywords, sentence in refusals:
        with pytest.raises(ValueError, match=sentence):
            function(*arguments, **keywords)
    assert torch.equal(down(experts, inter, ids, weights), experts(x, ids, weights))


def test_number_of_threads():
    before = warpdecode.get_num_threads()
    try:
        warpdecode.set_num_threads(np.int64(2))
        assert warpdecode.get_num_threads() == 2 and type(warpdecode.get_num_threads()) is int
        for count in (True, 0, -1, 2**31, 2.0, "2", None, np.arange(2)):
            with pytest.raises(ValueError, match=r"count: was .*, expected a whole number from 1 to 2147483647"):
                warpdecode.set_num_threads(count)
        assert warpdecode.get_num_threads() == 2
    finally:
        warpdecode.set_num_threads(before)


def _equal(experts, call, expected, answers):
    answers.put(torch.equal(experts(*call), expected))


def test_a_call_in_a_forked_process():
    """The pool's threads do not come along: the child starts its own, and the parent keeps its."""
    torch_threads, threads = torch.get_num_threads(), warpdecode.get_num_threads()
    torch.set_num_threads(1)  # torch's own threads would not come along either
    warpdecode.set_num_threads(2)
    try:
        layer = make_layer(8, 512, 256, torch.bfloat16)
        experts, call = warpdecode.Experts(layer.gate_up, layer.down), make_tokens(layer, 4, 4)
        expected = experts(*call)
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        child = context.Process(target=_equal, args=(experts, call, expected, answers), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0, "it waited for threads that it does not have"
        assert answers.get() and torch.equal(experts(*call), expected)
    finally:
        torch.set_num_threads(torch_threads)
        warpdecode.set_num_threads(threads)
