"""The options of the benchmark's commands: what is wrong is said before anything is measured, and rows are not lost."""

import json
import math
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import warpdecode
from test_bench_report import made_row
from warpdecode import cli
from warpdecode.bench import end_to_end, options, plot, report, runner
from warpdecode.bench.command import command
from warpdecode.bench.measure import measure
from warpdecode.hf.registries import ExpertsInterface
from warpdecode.shapes import SHAPES

COMMANDS = {"layers": lambda argv: cli.main(["bench", *argv]), "models": end_to_end.main}
needs_interface = pytest.mark.skipif(ExpertsInterface is None, reason="transformers 4 has no experts interface")
without_cuda = pytest.mark.skipif(warpdecode.cuda_usable()[0], reason="CUDA is usable here")


def exit_code(command, argv):
    """How a command ends; argparse ends it with SystemExit."""
    try:
        return COMMANDS[command](argv)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--shapes", "granite-3b,nosuch"], "--shapes was nosuch, expected qwen3-30b-a3b"),
        (["--shapes", "random:0"], "--shapes was random:0, expected"),
        (["--peers", "sglang"], "--peers was sglang, expected none or some of transformers, vllm, vllm-invariant"),
        (["--tokens", "1,many"], "--tokens was 1,many, expected whole numbers of at least 1, separated by commas"),
        (["--tokens", "0"], "--tokens was 0, expected whole numbers of at least 1"),
        (["--tokens", "4,-1"], "--tokens was 4,-1, expected whole numbers of at least 1"),
        (["--dtypes", "foo"], "--dtypes was foo, expected some of bfloat16, float16, float32"),
        (["--dtypes", "bfloat16,float64"], "--dtypes was float64, expected some of"),
        (["--kernels", ","], "--kernels was an empty name, expected some of cpu_"),
        (["--kernels", "cpu_generic,foo"], "--kernels was foo, expected some of cpu_"),
        (["--repeats", "-1"], "--repeats was -1, expected at least 1"),
        (["--repeats", "0"], "--repeats was 0, expected at least 1"),
        (["--layouts", ","], "--layouts was an empty name, expected all or some of transposed"),
        (["--layouts", "transposed,packed"], "--layouts was packed, expected all or some of transposed, interleaved"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--device", "cuda:0"], "argument --device: invalid choice: 'cuda:0'"),
        (
            ["--output", "no/such.jsonl"],
            "--output was no/such.jsonl, expected a file that can be written",
        ),
    ],
)
def test_wrong_options_of_layers(argv, sentence, capsys):
    assert exit_code("layers", ["--device", "cpu", *argv]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and not printed.out


@needs_interface
@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--models", "nosuch"], "--models was nosuch, expected some of qwen3-30b-a3b, gemma4-26b-a4b"),
        (["--modes", "eager,fast"], "--modes was fast, expected some of static, eager"),
        (["--variants", "vllm"], "--variants was vllm, expected some of stock"),
        (["--new-tokens", "1"], "--new-tokens was 1, expected at least 2"),
        (["--batch", "0"], "--batch was 0, expected whole numbers of at least 1, separated by commas"),
        (["--modes", ""], "--modes was an empty name, expected some of static, eager"),
        (["--seconds", "nan"], "--seconds was nan, expected a finite number greater than 0"),
        (["--seconds", "inf"], "--seconds was inf, expected a finite number greater than 0"),
        (["--seconds", "-5"], "--seconds was -5.0, expected a finite number greater than 0"),
        (["--seconds", "0"], "--seconds was 0.0, expected a finite number greater than 0"),
        (["--rounds", "0"], "--rounds was 0, expected at least 1"),
        (["--layers", "0"], "--layers was 0, expected at least 1"),
        (["--prompt-tokens", "0"], "--prompt-tokens was 0, expected at least 1"),
        (["--kernels"], "--kernels was given with --device cpu, expected a CUDA device"),
        (["--kernels", "--new-tokens", "3"], "--new-tokens was 3, expected at least 4"),
        (["--device", "cuda:0"], "argument --device: invalid choice: 'cuda:0'"),
        (
            ["--output", "no/such.jsonl"],
            "--output was no/such.jsonl, expected a file that can be written",
        ),
    ],
)
def test_wrong_options_of_models(argv, sentence, capsys, monkeypatch):
    # An option that is not refused must not end in a model of 60 GB.
    monkeypatch.setattr("warpdecode.bench.decode_models.build", None)
    assert exit_code("models", ["--device", "cpu", *argv]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and not printed.out


@without_cuda
@pytest.mark.parametrize("command", ["layers", pytest.param("models", marks=needs_interface)])
def test_cuda_where_it_cannot_be_used(command, capsys):
    assert exit_code(command, ["--device", "cuda"]) == 2
    assert f"--device was cuda, expected cpu: {warpdecode.cuda_usable()[1]}" in capsys.readouterr().err


def test_one_gpu_of_several_is_no_device_of_a_measurement():
    """It was timed with the CPU's clock, and its row was of a CPU."""
    with pytest.raises(ValueError, match="was cuda:0, expected cpu or cuda"):
        next(measure(SHAPES["granite-3b"], "bfloat16", [1], "cuda:0", "uniform", []))


def test_rows_are_in_the_file_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"first": 1}\n')
    with options.appended(str(path)) as append:
        append({"second": 2})
        assert path.read_text() == '{"first": 1}\n{"second": 2}\n'


def test_a_list_has_each_of_its_words_once_and_may_have_spaces():
    assert options.names("b, a,b", "abc") == ["b", "a"]
    assert options.numbers("4, 1,04,4") == [4, 1]
    with pytest.raises(ValueError, match="was an empty name, d, expected some of a, b, c"):
        options.names("a,,d", "abc")
    with pytest.raises(ValueError, match="was 1,, expected whole numbers"):
        options.numbers("1,")


def test_a_row_behind_an_interrupted_one_has_its_own_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"first": 1}\n{"sec')
    with options.appended(str(path)) as append:
        append({"third": 3})
    assert path.read_text() == '{"first": 1}\n{"sec\n{"third": 3}\n'
    assert f"{path}: line 2 has no end, as after an interrupted run; rows go behind it" in capsys.readouterr().err
    with options.appended(str(path)) as append:
        append({"fourth": 4})
    assert len(path.read_text().splitlines()) == 4 and not capsys.readouterr().err


def test_a_row_is_json_whatever_its_numbers_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    with options.appended(str(path)) as append:
        append({"error": math.nan, "times": [1.5, math.inf], "more": {"floor": -math.inf, "tokens": 1, "ran": True}})
    assert path.read_text() == (
        '{"error": null, "times": [1.5, null], "more": {"floor": null, "tokens": 1, "ran": true}}\n'
    )


def test_a_shape_that_does_not_fit_is_named_and_the_exit_code_says_so(tmp_path, capsys, monkeypatch):
    def first_does_not_fit(shape, *_, **__):
        if shape.name == "granite-3b":
            raise torch.OutOfMemoryError("there is no more")
        times = {"read ceiling": 80.0, "two reads": 90.0, "warpdecode": 100.0}
        yield made_row(shape.name, 1, times, same_bits_alone=True)

    monkeypatch.setattr(runner, "measure", first_does_not_fit)
    output = tmp_path / "rows.jsonl"
    argv = ["--shapes", "granite-3b,olmoe-1b-7b", "--tokens", "1", "--device", "cpu", "--peers", "none", "--no-parts"]
    assert exit_code("layers", [*argv, "--output", str(output)]) == 1
    assert [json.loads(line)["shape"] for line in output.read_text().splitlines()] == ["olmoe-1b-7b"]
    said = "granite-3b, bfloat16, uniform: the remaining rows are left out: OutOfMemoryError: there is no more"
    assert said in capsys.readouterr().err


def test_results_that_cannot_be_reported(tmp_path, capsys):
    def said(*argv):
        assert report.main([str(word) for word in argv]) == 1
        return capsys.readouterr().err

    assert "nosuch has no .jsonl file with rows" in said(tmp_path / "nosuch")
    (tmp_path / "empty.jsonl").write_text("")
    assert "has no .jsonl file with rows" in said(tmp_path)
    row = made_row("olmoe-1b-7b", 1, {"read ceiling": 80.0, "two reads": 90.0, "warpdecode": 100.0})
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert report.main([str(tmp_path)]) == 0 and "olmoe-1b-7b" in capsys.readouterr().out
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps(row) + "\n" + json.dumps(row)[:40])
    assert "cut.jsonl, line 2 is not JSON" in said(tmp_path)
    assert plot.main([str(cut), str(tmp_path / "out.png")]) == 1
    assert "cut.jsonl, line 2 is not JSON" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "nosuch"), str(tmp_path / "out.png")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_plot_says_what_it_takes(capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(["--help"])
    assert end.value.code == 0 and "RESULTS.jsonl OUT.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_models_without_a_package(name):
    """Help needs neither; a run says what is missing."""
    code = f"import sys; sys.modules[{name!r}] = None; from warpdecode.bench import end_to_end as e; sys.exit(e.main())"

    def run(*argv):
        return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)

    done = run("--help")
    assert done.returncode == 0 and "--models" in done.stdout and not done.stderr
    done = run("--device", "cpu")
    assert done.returncode == 1
    assert done.stderr == f"warpdecode.bench.end_to_end: needs {name}; pip install 'warpdecode[hf]'\n"


def test_an_end_that_is_no_mistake_of_the_code_is_a_sentence(capsys):
    def ends_with(error):
        @command("some.command")
        def main():
            raise error

        return main

    assert ends_with(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert ends_with(ModuleNotFoundError("none", name="matplotlib"))() == 1
    assert capsys.readouterr().err == "some.command: needs matplotlib; pip install 'warpdecode[notebook]'\n"
    for error in (ModuleNotFoundError("none", name="ours"), ImportError("no such name", name="torch"), ValueError()):
        with pytest.raises(type(error)):
            ends_with(error)()


@needs_interface
def test_models_are_interrupted_in_a_sentence(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(end_to_end, "_check", interrupted)
    assert end_to_end.main(["--device", "cpu"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
