"""What the layer benchmark times and how: rounds of cold calls in a fresh order, the same inputs for all."""

import itertools
import weakref

import pytest

pytest.importorskip("torch")

import torch

import warpdecode
from warpdecode.bench import candidates, timers
from warpdecode.bench.candidates import Candidate
from warpdecode.bench.layers import Layers
from warpdecode.shapes import Shape


def test_rounds_of_calls():
    cache = 60 << 20
    assert timers.cuda_calls(cache, 75_000_000, 1e8) == 16  # a token of Qwen3-30B-A3B
    assert timers.cuda_calls(cache, 1_500_000, 1e6) == 168  # so little that 16 calls would stay in the cache
    assert timers.cuda_calls(cache, 4_000_000_000, 1e10) == 5
    assert timers.cuda_calls(cache, 22_500_000_000, 1.15e13) == 2  # 16384 tokens of DeepSeek-V3
    cpu = timers.CpuTimer(None)
    assert cpu.calls(2, cpu.cache_bytes // 2, 1e8) == 8  # cold on the CPU, too
    assert cpu.calls(2, 1 << 20, 1e8) == 4 * cpu.cache_bytes >> 20 and cpu.calls(40, cpu.cache_bytes, 1e8) == 40


@pytest.mark.parametrize("routing", ["uniform", "zipf", "same"])
def test_inputs_are_those_of_the_seed_and_the_number_of_tokens(routing):
    shape = Shape("tiny", 16, 4, 32, 16)
    one, two = (Layers(shape, torch.bfloat16, "cpu", 1 << 12, seed) for seed in (5, 5))
    two.inputs(3, routing, lambda _: 2)  # another T before it changes nothing
    calls = [layers.inputs(7, routing, lambda call_bytes: 1 + call_bytes // call_bytes) for layers in (one, two)]
    for first, second in zip(*calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x, ids, weights = calls[0][0]
    assert x.shape == (7, 32) and ids.shape == weights.shape == (7, 4)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert (Layers.distinct(ids) == 4) == (routing == "same")
    assert not torch.equal(ids, calls[0][1][1])  # fresh for each call
    assert torch.equal(one.gate_up[0], two.gate_up[1]) and one.copies * 16 * one.expert_bytes >= 4 << 12


def test_a_plain_read_has_a_call_s_bytes_in_one_piece(monkeypatch):
    """However many experts a call has; two reads have gate_up's and down's shares of them."""
    layers = Layers(Shape("tiny", 6, 2, 32, 16), torch.bfloat16, "cpu", 1 << 14, 0)
    assert layers.copies > 2 and not torch.equal(layers.gate_up[0][0], layers.gate_up[0][1])
    taken = []
    monkeypatch.setattr(candidates, "read_memory", lambda memory, sink: lambda: taken.append(memory))
    distinct = [6, 1, 5, 3, 6, 2]
    for split, shares in ((False, [3]), (True, [2, 1])):
        for call, (experts, copy) in enumerate(zip(distinct, itertools.cycle(range(layers.copies)))):
            candidates.ceiling(layers, distinct, None, split=split).calls[call]()
            assert [memory.nbytes for memory in taken] == [experts * share * 32 * 16 * 2 for share in shares]
            owner = layers.gate_up[copy].untyped_storage()
            assert all(memory.untyped_storage().data_ptr() == owner.data_ptr() for memory in taken)
            assert split or all(memory.is_contiguous() for memory in taken)
            taken.clear()


def test_any_whole_number_is_a_seed():
    shape = Shape("tiny", 6, 2, 32, 16)
    found = [Layers(shape, torch.bfloat16, "cpu", 1 << 12, seed) for seed in (2 * 10**13, 2 * 10**13 + 1, -1)]
    for one, two in itertools.combinations(found, 2):
        assert not torch.equal(one.gate_up[0], two.gate_up[0])
        assert not torch.equal(*(layers.inputs(3, "uniform", lambda _: 1)[0][0] for layers in (one, two)))


def test_zipf_names_fewer_experts_than_uniform():
    layers = Layers(Shape("tiny", 64, 4, 32, 16), torch.bfloat16, "cpu", 1 << 12, 0)
    uniform, zipf = (
        sum(Layers.distinct(ids) for _, ids, _ in layers.inputs(16, routing, lambda _: 20)) / 20
        for routing in ("uniform", "zipf")
    )
    assert abs(uniform - 64 * (1 - (1 - 4 / 64) ** 16)) < 3  # 41.2, as of ids drawn evenly
    assert 15 < zipf < 0.85 * uniform


def test_candidates_run_in_another_order_in_each_repeat():
    order = []
    names = [f"candidate {i}" for i in range(6)]
    found = {name: Candidate([lambda name=name: order.append(name)], required=True) for name in names}
    timer = timers.CpuTimer(10)
    timer.time(found)
    rounds = [tuple(order[start : start + 6]) for start in range(6, len(order), 6)]  # the first six are the warm-up's
    assert len(rounds) == 11 and all(sorted(each) == names for each in rounds)
    assert len(set(rounds)) > 5


def test_a_candidate_that_fails_in_a_later_round_has_no_times():
    calls = itertools.count()

    def fails_late():
        if next(calls) == 3:
            raise RuntimeError("out of something\nand more")

    timer = timers.CpuTimer(4)
    times = timer.time({"works": Candidate([int], required=True), "peer": Candidate([fails_late])})
    assert list(times) == ["works"] and timer.taken == 4
    assert timer.failed == {"peer": "RuntimeError: out of something"}
    calls = itertools.count()
    times = timer.time_eager({"peer": Candidate([fails_late]), "works": Candidate([int])})
    assert list(times) == ["works"] and list(timer.failed) == ["peer"]
    calls = itertools.count()
    with pytest.raises(RuntimeError):
        timer.time({"warpdecode": Candidate([fails_late], required=True)})


def test_a_read_holds_the_memory_that_it_writes():
    sink = torch.empty(16, dtype=torch.uint8)
    held = weakref.ref(sink)
    read = candidates.read_memory(torch.zeros(64), sink)
    del sink
    assert held() is not None  # as long as `read`
    read()


def test_peers_have_as_many_threads_as_ours(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(warpdecode, "get_num_threads", lambda: before + 1)
    seen = set()
    candidate = {"peer": Candidate([lambda: seen.add(torch.get_num_threads())])}
    timer = timers.CpuTimer(2)
    timer.time(candidate)
    timer.time_eager(candidate)
    assert seen == {before + 1} and torch.get_num_threads() == before
