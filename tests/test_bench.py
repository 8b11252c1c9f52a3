"""The layer benchmark: what it measures is there, and makes sense."""

import json
import math
import subprocess

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from warpdecode.bench import kernels_seen, machine, peers
from warpdecode.bench.child import INVARIANT_NAME, Child, ChildFailed, merge
from warpdecode.bench.measure import measure
from warpdecode.bench.reference import sample
from warpdecode.bench.report import report
from warpdecode.cli import main
from warpdecode.shapes import NINE, SHAPES, named_shapes, random_shapes

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
        assert all(0 < time["p10"] <= time["median"] <= time["p90"] for time in row["eager_microseconds"].values())
        useful = 6 * row["tokens"] * 8 * 1536 * 512 / times["warpdecode"]["median"] * 1e-6
        assert math.isclose(row["tflops"]["warpdecode"], useful) and not CEILINGS & set(row["tflops"])
        assert row["failed"] == row["left_out"] == {} and row["calls"] >= row["copies"]
        assert row["environment"]["kernel"].startswith("cpu_") and row["environment"]["commit"] == "abc"
        assert row["environment"]["torch_threads"] == row["environment"]["threads"]
        assert row["environment"]["options"]["tokens"] == "1,3"
    printed = capsys.readouterr().out
    assert " eager " in printed and "peers: transformers (vllm: it runs on CUDA only; vllm-invariant: it" in printed
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


def test_routings_have_a_table_each(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    more = ["--tokens", "8", "--device", "cpu", "--peers", "none", "--no-parts", "--routing", "uniform, zipf"]
    assert main(options(output, *more)) == 0
    assert [row["routing"] for row in rows_of(output)] == ["uniform", "zipf"]
    headings = [line for line in capsys.readouterr().out.splitlines() if " routing, cpu; " in line]
    assert [heading.split(", ")[2] for heading in headings] == ["uniform routing", "zipf routing"]
    assert main(options(output, "--device", "cpu", "--routing", "uniform,random")) == 2
    assert "--routing was random, expected some of uniform, zipf, same" in capsys.readouterr().err


def test_a_peer_asked_for_that_cannot_run_is_named(tmp_path, capsys):
    cuda_only = "it runs on CUDA only"
    assert peers.chosen("vllm,transformers", "cpu") == (["transformers"], {"vllm": cuda_only})
    assert f"peer vllm left out: {cuda_only}" in capsys.readouterr().err
    assert peers.chosen(None, "cpu") == (["transformers"], {"vllm": cuda_only, "vllm-invariant": cuda_only})
    assert not capsys.readouterr().err
    assert peers.chosen("none", "cpu") == ([], {})
    with pytest.raises(ValueError, match="expected none or some of transformers, vllm, vllm-invariant"):
        peers.chosen(",", "cpu")
    output = tmp_path / "rows.jsonl"
    argv = options(output, "--tokens", "1", "--device", "cpu", "--no-parts", "--peers", "vllm,vllm-invariant")
    assert main(argv) == 1  # what was asked for is not there
    (row,) = rows_of(output)
    assert row["failed"] == {"vllm": cuda_only, INVARIANT_NAME: cuda_only}


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


def test_sampled_tokens_are_spread():
    assert sample(1) == [0] and sample(3) == [0, 1, 2] and sample(16384) == [0, 5461, 10922, 16383]


def test_a_child_measures_the_same_layer():
    asked = {"routing": "zipf", "seed": 1, "repeats": 3}
    (here,) = measure(GRANITE, "bfloat16", [2], "cpu", "zipf", [], repeats=3, seed=1, peers=["transformers"])
    child = Child({"OMP_NUM_THREADS": "1"})
    try:
        rows, why = child.measure(GRANITE, "bfloat16", [2], device="cpu", peers=["transformers"], **asked)
        assert list(rows) == [2] and why is None
        apart = rows[2]
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
    grouped, direct = ["sort_by_expert", "gate_up_grouped", "down_grouped"], ["gate_up_direct", "down_direct"]
    seen = {"warpdecode": grouped, "vllm": ["fused_moe_kernel"], "cuda_direct": direct, "layout pointers": grouped}
    seen |= {"cuda_tiled": ["gate_up_tiled_kernel", "down_tiled_kernel", "combine_slots"]}
    seen |= {"read ceiling": ["read_memory"], "two reads": ["read_memory"], "transformers grouped_mm": ["gemm"]}
    assert kernels_seen.unexpected(seen) == {}
    for name, kernels, part in (
        ("vllm", ["gemm"], "fused_moe"),
        ("warpdecode", ["gate_up_direct"], "down"),
        ("cuda_direct", grouped, "gate_up_direct"),
        ("cuda_tiled", ["gate_up_tiled_kernel", "down_grouped"], "down_tiled"),
        ("layout pointers", ["gemm", "down_grouped"], "gate_up"),
        ("two reads", ["Memcpy"], "read_memory"),
    ):
        expected = {name: f"it ran no kernel named {part}, but {', '.join(kernels)}"}
        assert kernels_seen.unexpected({**seen, name: kernels}) == expected
    assert kernels_seen.unexpected({"down": []}) == {"down": "it ran no kernel named down, but none"}


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
    more = ["--tokens", "2", "--device", "cuda", "--peers", "transformers", "--eager", "--kernels", "cuda_grouped"]
    assert main(options(output, *more, "--dtypes", "bfloat16,float16", "--routing", "zipf")) == 0
    rows = rows_of(output)
    assert [row["dtype"] for row in rows] == ["bfloat16", "float16"]
    for row in rows:
        assert sorted(row["peers"]) == sorted(PEERS) and row["failed"] == {}
        assert set(row["eager_microseconds"]) == {"warpdecode", "cuda_grouped", *PEERS}
        assert row["copies"] * 40 * 3 * 1536 * 512 * 2 > 4 * torch.cuda.get_device_properties(0).L2_cache_size
        assert 0.9 < row["error"] / row["rounding_floor"] < 1.02
        seen = row["kernels_seen"]  # of the graphs that were timed
        if seen is None or row["clocks"] is None:
            pytest.skip(f"no profiler or no nvidia-smi here: kernels {seen}, clocks {row['clocks']}")
        assert seen["read ceiling"] == seen["two reads"] == ["read_memory"]
        assert seen["cuda_grouped"] == ["gate_up_grouped", "down_grouped", "combine_slots"]
        assert seen["warpdecode"] == ["gate_up_direct", "down_direct"]
        assert row["clocks"]["sm_mhz"] > 0


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
