"""The command line itself: what it says about itself, its exit codes, and how little it imports to do so."""

import os
import re
import subprocess
import sys

import pytest

import warpdecode
from warpdecode import cli

LOCAL = [sys.executable, "-m", "warpdecode"]


def usage_error(argv, capsys):
    """Run a command line that has to be refused as wrong usage and return what it said."""
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["info", "--help"], ["bench", "--help"], ["generate", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: warpdecode")


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^    {command} +\w", out, re.MULTILINE), command


def test_generate_help_says_what_is_written_and_how_it_ends(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "logprobs are the model's own: the log-softmax of its raw logits, at temperature 1" in out
    assert "the end-of-sequence token included" in out and "the same command resumes" in out
    for code in ("0", "1", "2", "130"):
        assert re.search(rf"exit codes:.*\b{code} ", out), code


def test_no_command_is_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert "usage: warpdecode" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["dance"], "invalid choice: 'dance'"),
        (["generate", "m", "--output", "o"], "--prompts FILE is needed with a MODEL"),
        (["generate", "m", "--prompts", "p"], "--output FILE is needed with a MODEL"),
        (["generate", "--samples", "0"], "0 was given, at least 1 was expected"),
        (["generate", "--batch-size", "-3"], "-3 was given, at least 1 was expected"),
        (["generate", "--samples", "many"], "invalid whole number value: 'many'"),
        (["generate", "--temperature", "-1"], "-1 was given, a finite number of at least 0 was expected"),
        (["generate", "--temperature", "nan"], "nan was given, a finite number of at least 0 was expected"),
        (["generate", "--temperature", "warm"], "argument --temperature: invalid number value: 'warm'"),
        (["generate", "--top-p", "most"], "argument --top-p: invalid number value: 'most'"),
        (["generate", "--top-p", "0"], "0 was given, a number above 0 and at most 1 was expected"),
        (["generate", "--top-p", "1.5"], "1.5 was given, a number above 0 and at most 1 was expected"),
        (["generate", "--dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_wrong_usage(argv, sentence, capsys):
    assert sentence in usage_error(argv, capsys)


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == warpdecode.info() + "\n"


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "WARPDECODE_NUM_THREADS"])
@pytest.mark.parametrize("number", ["0", "\u00b2", str(2**31)])
def test_a_wrong_number_of_threads_is_a_sentence(variable, number):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment[variable] = number
    done = subprocess.run([*LOCAL, "info"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"warpdecode: {variable}: was {number!r}, expected a number of threads from 1 to 2147483647\n"


def test_a_library_that_is_not_there_is_a_sentence(tmp_path):
    done = subprocess.run(
        [*LOCAL, "info"], env={**os.environ, "WARPDECODE_LIBRARY": str(tmp_path / "no.so")}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no.so" in done.stderr and "set WARPDECODE_LIBRARY to a library, or unset it" in done.stderr


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"warpdecode {warpdecode.__version__}\n"


def test_failures_are_a_sentence_and_exit_code_1(tmp_path, capsys):
    pytest.importorskip("transformers")
    prompts = tmp_path / "p.txt"
    prompts.write_text("1+1=\n")
    sentences = {"tpu9": "--device tpu9 is no device", "meta": "runs on cpu and cuda", "cuda:99": "sees no such GPU"}
    for device, sentence in sentences.items():
        argv = ["generate", "--prompts", str(prompts), "--output", str(tmp_path / "o.jsonl"), "--device", device]
        assert cli.main(argv) == 1
        said = capsys.readouterr().err
        assert said.startswith("warpdecode generate: error: ") and sentence in said


def test_python_m_warpdecode_and_its_exit_codes():
    done = subprocess.run([*LOCAL, "info"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == warpdecode.info() + "\n", done.stderr
    done = subprocess.run([*LOCAL, "generate", "--top-p", "7"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: warpdecode generate")
    done = subprocess.run(LOCAL, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: warpdecode")


def test_help_and_usage_errors_do_not_wait_for_torch():
    code = (
        "import sys; from warpdecode import cli\n"
        "try: cli.main(['generate', '--top-p', '7'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
