"""What the layer benchmark cannot measure, or measures wrong, is in its rows, on stderr and in its exit code."""

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import warpdecode
from test_bench import PEERS, options, rows_of
from warpdecode.bench import failures, measure, peer_transformers, peers, runner, timers
from warpdecode.bench.candidates import Candidate
from warpdecode.bench.child import INVARIANT_NAME, ChildFailed
from warpdecode.bench.layers import Layers
from warpdecode.cli import main
from warpdecode.shapes import Shape

SMALL = Shape("small", 8, 2, 1024, 512)
NO_PEERS = ["--tokens", "1,2", "--device", "cpu", "--peers", "none", "--no-parts"]
CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def test_what_fails_is_reported_and_what_must_run_raises():
    def fails():
        raise RuntimeError("out of something\nand more")

    timer = timers.CpuTimer(3)
    times = timer.time({"works": Candidate([int]), "peer": Candidate([fails])})
    assert list(times) == ["works"] and timer.failed == {"peer": "RuntimeError: out of something"}
    with pytest.raises(RuntimeError):
        timer.time({"warpdecode": Candidate([fails], required=True)})


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError(CPU_MEMORY), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError("threads"), True),
        (RuntimeError("out of something"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory(error, expected):
    assert failures.out_of_memory(error) == expected


def test_a_shape_that_does_not_fit_the_cpu_s_memory_is_left_out(tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError(CPU_MEMORY)

    monkeypatch.setattr(measure, "Layers", fails)
    assert main(options(tmp_path / "rows.jsonl", *NO_PEERS)) == 1
    assert f"granite-3b, bfloat16, uniform: the remaining rows are left out: RuntimeError: {CPU_MEMORY}" in (
        capsys.readouterr().err
    )


def test_a_peer_whose_calls_cannot_be_made_is_left_out(tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise TypeError("it has changed")

    monkeypatch.setattr(peer_transformers, "candidates", fails)
    output = tmp_path / "rows.jsonl"
    assert main(options(output, "--tokens", "1", "--device", "cpu", "--no-parts")) == 1
    (row,) = rows_of(output)
    assert row["failed"] == {"transformers": "TypeError: it has changed"} and row["peers"] == []
    assert "granite-3b, T 1: transformers left out: TypeError: it has changed" in capsys.readouterr().err


def test_a_peer_whose_output_is_no_number_is_left_out(monkeypatch):
    nothing = torch.full((1, SMALL.hidden), math.nan)
    monkeypatch.setattr(peers, "candidates", lambda *_, **__: ({"a peer": Candidate([lambda: nothing])}, {}, {}))
    (row,) = measure.measure(SMALL, "bfloat16", [1], "cpu", "uniform", [], repeats=1)
    assert row["failed"] == {"a peer": "its output is not finite"} and row["peers"] == []


def test_parts_and_kernels_that_cannot_be_made_are_left_out(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError(CPU_MEMORY)

    monkeypatch.setattr(measure.ours, "parts", fails)
    monkeypatch.setattr(measure.ours, "in_layout", fails)
    (row,) = measure.measure(
        SMALL, "bfloat16", [1], "cpu", "uniform", [], repeats=1, peers=False, parts=True, layouts=["gpt-oss"]
    )
    assert list(row["failed"]) == ["layout gpt-oss", "gate_up and down alone"]
    assert set(row["microseconds"]) == {"warpdecode", "read ceiling", "two reads"} and row["layouts"] == []
    assert "small, T 1: layout gpt-oss left out: RuntimeError" in capsys.readouterr().err


def test_peers_left_out_on_purpose_have_a_reason_and_one_line_a_shape(monkeypatch, capsys):
    monkeypatch.setattr(peer_transformers, "_MOST_COPIED_BYTES", 3 * SMALL.top_k * SMALL.bytes_per_expert())
    monkeypatch.setattr(peer_transformers, "LONG", 6)
    rows = list(
        measure.measure(SMALL, "bfloat16", [3, 4, 5, 6], "cpu", "uniform", [], repeats=1, peers=["transformers"])
    )
    copies = "it copies an expert per route, over 0 GB"
    long = "not timed from 6 tokens on"
    batched = {PEERS[2]: copies}
    assert [row["left_out"] for row in rows] == [{}, batched, batched, {PEERS[0]: long, PEERS[2]: long}]
    assert all(row["failed"] == {} and not set(row["left_out"]) & set(row["microseconds"]) for row in rows)
    said = capsys.readouterr().err
    assert said.count(copies) == 1 and f"small, T 4, 5: {PEERS[2]} left out: {copies}\n" in said


def test_fewer_repeats_than_asked_for_are_said_once(monkeypatch, capsys):
    monkeypatch.setattr(timers.CpuTimer, "row_seconds", 0.0)
    rows = list(measure.measure(SMALL, "bfloat16", [1, 2], "cpu", "uniform", [], repeats=5, peers=False))
    assert [row["repeats"] for row in rows] == [3, 3]
    said = capsys.readouterr().err
    assert "small, from T 1 on: 3 repeats, not 5, which take over 0 s; " in said and said.count(" repeats, ") == 1


@pytest.mark.parametrize("error", [math.nan, math.inf, 0.5])
def test_a_wrong_output_of_ours_is_said_and_its_rows_are_json(error, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "_errors", lambda *_: ({"warpdecode": error}, 0.001, {}))
    output = tmp_path / "rows.jsonl"
    assert main(options(output, *NO_PEERS)) == 1
    text = output.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [row["error"] for row in rows_of(output)] == 2 * [error if math.isfinite(error) else None]
    assert (
        f"granite-3b, T 2: our output is wrong: its error is {error:.3g}, expected at most" in capsys.readouterr().err
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_rounding_of_sums_in_float32_is_not_wrong(dtype):
    (row,) = measure.measure(SMALL, dtype, [2], "cpu", "uniform", [], repeats=1, peers=False)
    assert measure.wrong(row) is None
    assert (row["error"] > 1.1 * row["rounding_floor"]) == (dtype == "float32")  # of which rounding is the smaller part
    assert "our output is wrong" in measure.wrong({**row, "error": 1.3 * row["rounding_floor"] + 1e-5})


def test_bits_that_depend_on_the_batch_are_wrong():
    layers = Layers(SMALL, torch.bfloat16, "cpu", 1 << 12, 0)
    (call,) = layers.inputs(9, "uniform", lambda _: 1)
    together = warpdecode.moe(*call, layers.gate_up[0], layers.down[0], activation=SMALL.activation)
    assert measure.same_bits_alone(layers, call, together)
    for token in (0, 2, 5, 8):  # the sampled ones
        other = together.clone()
        other.view(torch.int16)[token, 3] += 1  # the last bit
        assert not measure.same_bits_alone(layers, call, other), token
    (row,) = measure.measure(SMALL, "bfloat16", [5], "cpu", "uniform", [], repeats=1, peers=False)
    assert row["same_bits_alone"] is True
    said = "our output is wrong: a token alone has other bits than in its batch"
    assert measure.wrong({**row, "same_bits_alone": False}) == said


class OneChild:
    """A child that answers all requests alike."""

    answer = None

    def __init__(self, _):
        pass

    def measure(self, *_, **__):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self):
        pass


def rows_with_a_child(monkeypatch, answer, asked="vllm-invariant"):
    """Two rows that a Runner makes where its child answers so, and whether it calls them complete."""

    def row(tokens, **more):
        times = {name: {"median": 1.0, "p10": 1.0, "p90": 1.0} for name in ("read ceiling", "two reads", "warpdecode")}
        found = {
            "shape": SMALL.name, "tokens": tokens, "hidden": 8, "intermediate": 8, "error": 1.0, "rounding_floor": 1.0,
            "same_bits_alone": True,
            "microseconds": times, "peers": [], "peer_errors": {}, "failed": {}, "ratios": {}, "tflops": {}, **more,
        }  # fmt: skip
        return found

    def apart(tokens, mode):
        found = row(tokens, peer_errors={"vllm": 0.1}, ratios={"vllm": 2.0}, tflops={"vllm": 3.0})
        found["microseconds"]["vllm"] = found["microseconds"]["warpdecode"]
        return {**found, "vllm_config": {"batch_invariant": mode}}

    if isinstance(answer, tuple):
        modes, why = answer
        answer = {tokens: apart(tokens, mode) for tokens, mode in modes.items()}, why
    monkeypatch.setattr(OneChild, "answer", answer)
    monkeypatch.setattr(runner, "Child", OneChild)
    monkeypatch.setattr(runner, "measure", lambda *_, **__: map(row, (1, 4)))
    args = type("Args", (), {"repeats": 1, "seed": 0, "eager": False, "no_profile": True, "no_parts": True})
    args.peers = asked
    made = runner.Runner("cuda", [], ["vllm-invariant"], {}, [], args)
    return list(made.rows(SMALL, "bfloat16", "uniform", [1, 4])), made.complete


def test_a_child_s_peer_is_merged(monkeypatch):
    rows, complete = rows_with_a_child(monkeypatch, ({1: True, 4: True}, None))
    assert complete and all(row["failed"] == {} and row["peers"] == [INVARIANT_NAME] for row in rows)


@pytest.mark.parametrize(
    "answer, asked, failed",
    [
        (ChildFailed("it ended"), None, {1: "it ended", 4: "it ended"}),
        (({1: True}, "no memory"), None, {4: "no memory"}),
        (({1: True, 4: False}, None), None, {4: "its process does not say that it is batch-invariant, but {"}),
        (ChildFailed("no import", final=True), "vllm-invariant", {1: "no import", 4: "no import"}),
        (ChildFailed("no import", final=True), None, {}),  # nobody asked for it
    ],
)
def test_a_child_that_fails_is_in_the_rows(answer, asked, failed, monkeypatch, capsys):
    rows, complete = rows_with_a_child(monkeypatch, answer, asked)
    for row in rows:
        assert list(row["failed"]) == ([INVARIANT_NAME] if row["tokens"] in failed else [])
        assert (INVARIANT_NAME in row["microseconds"]) == (isinstance(answer, tuple) and not row["failed"])
        if row["failed"]:
            assert row["failed"][INVARIANT_NAME].startswith(failed[row["tokens"]])
    assert complete == (not failed)
    assert f"{INVARIANT_NAME} left out: " in capsys.readouterr().err


def test_a_candidate_with_wrong_kernels_is_left_out_unless_it_is_ours(monkeypatch):
    timed = {"warpdecode": Candidate([int], required=True), "vllm": Candidate([int])}
    seen = {"warpdecode": ["gate_up_direct", "down_direct"], "vllm": ["gemm"]}
    rounds = dict.fromkeys(timed, int)
    monkeypatch.setattr(measure, "kernels_seen", lambda calls: seen)
    assert measure._seen(timed, rounds) == (seen, {"vllm": "it ran no kernel named fused_moe, but gemm"})
    recordings = iter(
        [{"warpdecode": ["gate_up_direct"], "vllm": ["fused_moe"]}, {**seen, "warpdecode": ["down_direct"]}]
    )
    monkeypatch.setattr(measure, "kernels_seen", lambda calls: next(recordings))  # each has lost other events
    both = {"warpdecode": ["gate_up_direct", "down_direct"], "vllm": ["fused_moe", "gemm"]}
    assert measure._seen(timed, rounds) == (both, {})
    monkeypatch.setattr(measure, "kernels_seen", lambda calls: seen)
    seen["warpdecode"] = ["gemm"]
    with pytest.raises(RuntimeError, match="warpdecode: it ran no kernel named gate_up, but gemm"):
        measure._seen(timed, rounds)
