"""The layer benchmark: what it measures is there, and makes sense."""

import itertools
import json
import math
import subprocess

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from warpdecode.bench import candidates, kernels_seen, machine, peers, plot, timers
from warpdecode.bench.candidates import Candidate
from warpdecode.bench.child import INVARIANT_NAME, Child, ChildFailed, merge
from warpdecode.bench.layers import Layers
from warpdecode.bench.measure import derived, measure
from warpdecode.bench.reference import sample
from warpdecode.bench.report import layer_table, report
from warpdecode.cli import main
from warpdecode.shapes import NINE, SHAPES, Shape, named_shapes, random_shapes

GRANITE = SHAPES["granite-3b"]
PEERS = ["transformers eager", "transformers grouped_mm", "transformers batched_mm"]
PARTS = {"gate_up", "down"}
CEILINGS = {"read ceiling", "two reads"}


def rows_of(path):
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(output, *more):
    """A short run on granite-3b."""
    return ["bench", "--shapes", "granite-3b", "--repeats", "3", "--output", str(output), *more]


def test_rows_on_the_cpu(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    more = ["--tokens", "1,3", "--device", "cpu", "--kernels", "cpu_generic", "--eager", "--commit", "abc"]
    assert main(options(output, *more)) == 0
    rows = rows_of(output)
    assert [row["tokens"] for row in rows] == [1, 3]
    for row in rows:
        assert sorted(row["peers"]) == sorted(PEERS)
        times = row["microseconds"]
        assert set(times) == {"warpdecode", "cpu_generic", *CEILINGS, *PARTS, *PEERS}
        assert all(0 < time["p10"] <= time["median"] <= time["p90"] for time in times.values())
        assert row["distinct_bytes"] <= row["gross_bytes"] == row["tokens"] * 8 * 3 * 1536 * 512 * 2
        assert row["error"] <= 1.02 * row["rounding_floor"] < min(row["peer_errors"].values())
        assert set(row["eager_microseconds"]) == {"warpdecode", "cpu_generic", *PEERS}
        useful = 6 * row["tokens"] * 8 * 1536 * 512 / times["warpdecode"]["median"] * 1e-6
        assert math.isclose(row["tflops"]["warpdecode"], useful) and not CEILINGS & set(row["tflops"])
        assert row["failed"] == {} and row["calls"] >= row["copies"]
        assert row["environment"]["kernel"].startswith("cpu_") and row["environment"]["commit"] == "abc"
    printed = capsys.readouterr().out
    assert "granite-3b (E40 K8 H1536 I512), bfloat16, uniform routing, cpu" in printed
    assert report(tmp_path).count("\n| ") >= 3


def test_no_peers_no_parts(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    more = ["--tokens", "2", "--device", "cpu", "--peers", "none", "--no-parts", "--routing", "same"]
    assert main(options(output, *more)) == 0
    (row,) = rows_of(output)
    assert set(row["microseconds"]) == {"warpdecode", *CEILINGS} and row["peers"] == []
    assert row["distinct_bytes"] * 2 == row["gross_bytes"]  # both tokens have the same experts
    assert "| 2 |" in report(tmp_path) and "transformers" not in report(tmp_path).split("\n\n", 1)[1]
    assert "peers: none" in capsys.readouterr().out


def test_a_peer_asked_for_that_cannot_run_is_named(capsys):
    assert peers.chosen("vllm,transformers", "cpu") == ["transformers"]
    assert "peer vllm left out: it runs on CUDA only" in capsys.readouterr().err
    assert peers.chosen(None, "cpu") == ["transformers"]
    assert not capsys.readouterr().err


def test_named_shapes():
    assert [shape.name for shape in named_shapes("nine")] == list(NINE)
    assert NINE[0] == "qwen3-30b-a3b" and NINE[-1] == "deepseek-v3" and len(NINE) == 9
    assert [shape.name for shape in named_shapes("olmoe-1b-7b,nine")] == ["olmoe-1b-7b", *NINE[:3], *NINE[4:]]


def test_random_shapes():
    shapes = random_shapes(200, seed=3)
    assert shapes == named_shapes("random:200", 3) != random_shapes(200, seed=4)
    assert len({shape.name for shape in shapes}) == 200
    for shape in shapes:
        assert 7 <= shape.experts <= 512 and shape.top_k in (1, 2, 4, 5, 6, 8, 10, 12)
        assert 2 * shape.top_k <= shape.experts
        assert 1024 <= shape.hidden <= 8192 and shape.hidden % 64 == 0
        assert 64 <= shape.intermediate <= 16384 and shape.intermediate % 8 == 0
        assert shape.experts * shape.bytes_per_expert() <= 12e9
    assert any(shape.hidden % 512 for shape in shapes) and max(shape.intermediate for shape in shapes) > 8000
    assert any(shape.experts % 8 for shape in shapes) and sum(shape.intermediate >= 512 for shape in shapes) > 120


def test_rounds_of_calls():
    cache = 60 << 20
    assert timers.cuda_calls(cache, 75_000_000, 1e8) == 16  # a token of Qwen3-30B-A3B
    assert timers.cuda_calls(cache, 1_500_000, 1e6) == 168  # so little that 16 calls would stay in the cache
    assert timers.cuda_calls(cache, 4_000_000_000, 1e10) == 5
    assert timers.cuda_calls(cache, 22_500_000_000, 1.15e13) == 2  # 16384 tokens of DeepSeek-V3
    cpu = timers.CpuTimer(None)
    assert cpu.calls(2, cpu.cache_bytes // 2, 1e8) == 8  # cold on the CPU, too
    assert cpu.calls(2, cpu.cache_bytes // 99, 1e8) == 16 and cpu.calls(40, cpu.cache_bytes, 1e8) == 40


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


def test_sampled_tokens_are_spread():
    assert sample(1) == [0] and sample(3) == [0, 1, 2] and sample(16384) == [0, 5461, 10922, 16383]


def test_what_fails_is_reported_and_what_must_run_raises():
    def fails():
        raise RuntimeError("out of something\nand more")

    timer = timers.CpuTimer(3)
    times = timer.time({"works": Candidate([int]), "peer": Candidate([fails])})
    assert list(times) == ["works"] and timer.failed == {"peer": "RuntimeError: out of something"}
    with pytest.raises(RuntimeError):
        timer.time({"warpdecode": Candidate([fails], required=True)})


def test_a_child_measures_the_same_layer():
    asked = {"routing": "zipf", "seed": 1, "repeats": 3}
    (here,) = measure(GRANITE, "bfloat16", [2], "cpu", "zipf", [], repeats=3, seed=1, peers=["transformers"])
    child = Child({"OMP_NUM_THREADS": "1"})
    try:
        apart = child.measure(GRANITE, "bfloat16", [2], device="cpu", peers=["transformers"], **asked)[2]
        for key in ("error", "rounding_floor", "distinct_bytes"):  # its weights and inputs are ours
            assert apart[key] == here[key]
        merge(here, apart, PEERS[1], "a peer apart")
        assert here["ratios"]["a peer apart"] == apart["ratios"][PEERS[1]]
        assert here["apart"]["a peer apart"]["microseconds"]["warpdecode"] == apart["microseconds"]["warpdecode"]
        assert here["microseconds"]["warpdecode"] != apart["microseconds"]["warpdecode"]
        with pytest.raises(ChildFailed, match="nosuch"):  # refused, and the child is still there
            child.measure(GRANITE, "bfloat16", [1], device="cpu", peers=[], routing="uniform", nosuch=1)
        child._process.kill()
        with pytest.raises(ChildFailed, match="ended with exit code -9"):
            child.measure(GRANITE, "bfloat16", [1], device="cpu", peers=[], **asked)
        try:
            import vllm  # noqa: F401
        except ImportError:
            with pytest.raises(ChildFailed, match="importing it failed") as failed:  # a new process says so
                child.measure(GRANITE, "bfloat16", [1], device="cpu", peers=["vllm"], **asked)
            assert failed.value.final
    finally:
        child.close()


def made_row(shape, tokens, times, distinct_bytes=10**9, apart=None, **more):
    """A row of a GPU's result file with these medians, as `measure` makes it."""
    shape = SHAPES[shape]
    found = [name for name in times if name.split()[0] in ("transformers", "vllm")]
    row = {
        "shape": shape.name, "experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden,
        "intermediate": shape.intermediate, "dtype": "bfloat16", "device": "cuda", "routing": "uniform",
        "tokens": tokens, "distinct_bytes": distinct_bytes, "peers": found, "error": 0.001, "rounding_floor": 0.001,
        "peer_errors": {name: 0.003 for name in found}, "failed": {},
        "microseconds": {name: {"median": time, "p10": time, "p90": time} for name, time in times.items()},
        "environment": {"gpu": "a GPU", "warpdecode": "1", "torch": "2", "vllm": "3", "date": "today"}, **more,
    }  # fmt: skip
    row.update(derived(row, {name: 6e9 for name in times if "read" not in name}))
    if apart:
        row["apart"] = {}
        merge(row, made_row(shape.name, tokens, apart), "vllm", INVARIANT_NAME)
    return row


def test_report_of_several_shapes():
    times = {
        "read ceiling": 80.0,
        "two reads": 90.0,
        "warpdecode": 100.0,
        "vllm": 250.0,
        "transformers batched_mm": 400.0,
    }
    prefill = {"read ceiling": 1.0, "two reads": 1.0, "warpdecode": 20.0, "vllm": 10.0, "transformers grouped_mm": 12.0}
    child = {"read ceiling": 80.0, "two reads": 90.0, "warpdecode": 110.0, "vllm": 330.0}
    text = layer_table([
        made_row("qwen3-30b-a3b", 1, times, distinct_bytes=75_000_000, apart=child),
        made_row("qwen3-30b-a3b", 4, {name: time for name, time in times.items() if name != "vllm"}),
        made_row("mixtral-8x7b", 4, times, vllm_config={"table": "E=8,N=14336.json"}),
        made_row("mixtral-8x7b", 512, prefill),
    ])  # fmt: skip
    for line in (
        "2 layers, bfloat16, CUDA graph replays, cold weights, uniform routing, medians; "
        "a GPU; warpdecode 1, torch 2, vllm 3; today.",
        "| shape | T 1 | T 4 |",
        "| qwen3-30b-a3b | 0.90* | 0.80 |",
        "| mixtral-8x7b |  | 0.80 |",
        "qwen3-30b-a3b (E128 K8 H2048 I768):",
        "| 1 | 80.0 | 100.0 (100.0 to 100.0) | 0.80 (0.90 of two reads) | 250.0 | 2.50 | 3.00 | "
        "400 (batched_mm) | 4.00 |",
        "| 4 | 80.0 | 100.0 (100.0 to 100.0) | 0.80 | - | - | - | 400 (batched_mm) | 4.00 |",
        "vLLM's time divided by ours:",
        "| qwen3-30b-a3b | 2.50 | - |",
        "The time of vLLM, batch-invariant, divided by ours:",
        "vLLM has a table tuned for this GPU for mixtral-8x7b; its defaults for the rest.",
        "Useful TFLOP/s, ours / vLLM / transformers grouped_mm:",
        "| mixtral-8x7b | 300 / 600 / 500 |",
        "Error against FP64, in units of the output's own rounding: ours at most 1.000, transformers' paths up to 3.0, "
        "vLLM's up to 3.0.",
    ):
        assert f"\n{line}\n" in f"\n{text}\n", line


def test_plot(tmp_path):
    times = {"read ceiling": 80.0, "two reads": 90.0, "warpdecode": 100.0, "vllm": 250.0, "gate_up": 60.0}
    results = tmp_path / "rows.jsonl"
    rows = [made_row("olmoe-1b-7b", 4, times), made_row("olmoe-1b-7b", 1, times), made_row("qwen3-next", 1, times)]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = plot.plot(rows)
    assert len(figure.axes) == 4
    lines = {line.get_label(): line for line in figure.axes[1].get_lines()}
    assert list(lines["warpdecode"].get_xdata()) == [1, 4] and list(lines["vllm"].get_ydata()) == [0.32, 0.32]
    assert "gate_up" not in lines and "gate_up" in [line.get_label() for line in figure.axes[0].get_lines()]
    assert plot.main([str(results), str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name, short",
    [
        ("void gate_up_grouped<__nv_bfloat16, 8>(wd_gate_up_args, RouteLists)", "gate_up_grouped"),
        ("void (anonymous namespace)::down_direct<__half>(wd_down_args, bool)", "down_direct"),
        ("void at::native::reduce_kernel<4, at::native::ReduceOp<int> >(int)", "reduce_kernel"),
        ("fused_moe_kernel", "fused_moe_kernel"),
        ("Memset (Device)", "Memset"),
    ],
)  # fmt: skip
def test_kernel_names_are_shortened(name, short):
    assert kernels_seen.shortened(name) == short


def test_a_wrong_kernel_is_named():
    seen = {"warpdecode": ["sort_routes_kernel", "gate_up_grouped", "down_grouped"], "vllm": ["fused_moe_kernel"]}
    assert kernels_seen.unexpected(seen) is None
    assert kernels_seen.unexpected({**seen, "vllm": ["gemm"]}) == "vllm ran no kernel named fused_moe, but gemm"
    assert kernels_seen.unexpected({"down": []}) == "down ran no kernel named down, but none"


def test_commit(tmp_path):
    def git(*command):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *command], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    file = tmp_path / "file"
    file.write_text("1")
    assert machine.commit_of(file) is None  # in a checkout, but not of it
    git("add", "file")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD").strip()
    assert machine.commit_of(file) == head
    file.write_text("2")
    assert machine.commit_of(file) == f"{head}-dirty"


@pytest.mark.gpu
def test_rows_on_cuda(cuda, tmp_path):
    output = tmp_path / "rows.jsonl"
    more = ["--tokens", "2", "--device", "cuda", "--peers", "transformers", "--eager"]
    assert main(options(output, *more, "--dtypes", "bfloat16,float16", "--routing", "zipf")) == 0
    rows = rows_of(output)
    assert [row["dtype"] for row in rows] == ["bfloat16", "float16"]
    for row in rows:
        assert sorted(row["peers"]) == sorted(PEERS) and set(row["eager_microseconds"]) == {"warpdecode", *PEERS}
        assert row["copies"] * 40 * 3 * 1536 * 512 * 2 > 4 * torch.cuda.get_device_properties(0).L2_cache_size
        assert 0.9 < row["error"] / row["rounding_floor"] < 1.02
        seen = row["kernels_seen"]
        assert seen is None or any("gate_up" in name for name in seen["warpdecode"])


@pytest.mark.gpu
def test_vllm_on_cuda(cuda, tmp_path):
    pytest.importorskip("vllm")
    output = tmp_path / "rows.jsonl"
    assert main(options(output, "--tokens", "1,64", "--device", "cuda", "--peers", "vllm,vllm-invariant")) == 0
    for row in rows_of(output):
        assert row["peers"] == ["vllm", INVARIANT_NAME] and row["failed"] == {}
        assert max(row["peer_errors"].values()) < 0.02
        apart = row["apart"][INVARIANT_NAME]
        assert apart["vllm_config"]["batch_invariant"] and not row["vllm_config"]["batch_invariant"]
        times = apart["microseconds"]
        assert math.isclose(row["ratios"][INVARIANT_NAME], times["vllm"]["median"] / times["warpdecode"]["median"])
