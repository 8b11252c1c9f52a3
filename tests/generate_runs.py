"""Runs of ``warpdecode generate`` on a small model: the fixtures and helpers of test_generate_*.py.

The model is a real, tiny Qwen3-MoE with random weights: its samples are long and varied, where the demo's are all but
certain. Everything runs through the command line's ``main``, most of it in this process. What has to be killed runs in
processes forked from a server that has imported torch once.

conftest.py registers this file as a plugin, which every test run imports: torch is imported where it is used.
"""

import json
import multiprocessing
import os
import signal
import sys

import pytest

from warpdecode import cli, demo
from warpdecode.generate.journal import meta_path

EOS = 1
PROMPTS = ["12+34=", "7+8=", "999+1=", "12+34=", "250+250="]  # one twice: its samples have to differ all the same
OPTIONS = {
    "--samples": 3,
    "--batch-size": 4,  # 15 samples: the last batch is not full, and no batch ends where a prompt does
    "--max-new-tokens": 12,
    "--temperature": 1.0,
    "--top-p": 1.0,
    "--seed": 0,
    "--dtype": "float32",
    "--device": "cpu",
}


@pytest.fixture(scope="module")
def one_thread():
    """One thread: for so small a model more only wait for each other, most of all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_model(folder, *, tie_word_embeddings=False, **generation):
    """Save a tiny random model; the demo's tokenizer has its vocabulary."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_path())
    torch.manual_seed(3)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.2,  # so that the logits differ by some units, as those of a trained model
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(**{"eos_token_id": EOS, "pad_token_id": 0, **generation})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(prompt + "\n" for prompt in PROMPTS))
    return path


def arguments(model, prompts, output, **changed):
    """Return the command line of a run; ``changed`` replaces options, ``top_p=0.5`` for ``--top-p``."""
    options = OPTIONS | {"--" + name.replace("_", "-"): value for name, value in changed.items()}
    words = ["generate", model, "--prompts", prompts, "--output", output]
    return [str(word) for word in [*words, *(part for option in options.items() for part in option)]]


@pytest.fixture
def generate(model_folder, prompts_file, tmp_path, capfd):
    """Return a function that runs ``generate`` and gives its exit code, its output file and what it printed."""

    def run(output="out.jsonl", model=model_folder, prompts=prompts_file, flags=(), **changed):
        path = tmp_path / output
        code = cli.main([*arguments(model, prompts, path, **changed), *flags])
        printed = capfd.readouterr()
        return code, path, printed.out + printed.err

    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def reference(model_folder, prompts_file, tmp_path_factory):
    """Return the file of an uninterrupted run with OPTIONS."""
    path = tmp_path_factory.mktemp("reference") / "out.jsonl"
    assert cli.main(arguments(model_folder, prompts_file, path)) == 0
    return path


def begun_like(reference, output, content=None):
    """Put a file at ``output`` that a run like ``reference`` began and left with ``content``."""
    meta_path(output).write_bytes(meta_path(reference).read_bytes())
    output.write_bytes(reference.read_bytes() if content is None else content)


def strike(number, event, function, nth, later=0):
    """Have this process send itself ``number``, a signal, at ``function``'s ``nth`` event, or ``later`` more events on.

    The moment is a place in the run and no time, so a busy machine does not move it and the run cannot end before.
    Events are those of ``sys.setprofile``: "call" as a function begins, "return" as it ends, of C functions too.
    """

    def seen(frame, what, _):
        nonlocal nth, later
        if nth:
            nth -= what == event and frame.f_code is function.__code__
        else:
            later -= 1
        if not nth and later <= 0:
            sys.setprofile(None)
            os.kill(os.getpid(), number)

    sys.setprofile(seen)


def in_child(log, argv, struck=None):
    """Run the command line in a forked child, what it prints going to ``log``; ``struck`` is what ``strike`` takes."""
    import torch

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    torch.set_num_threads(1)
    if struck is not None:
        strike(*struck)
    os._exit(cli.main(argv))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warpdecode.generate.command", "transformers.models.qwen3_moe.modeling_qwen3_moe"])
    return context


@pytest.fixture
def run_child(processes, model_folder, prompts_file, tmp_path):
    """Return a function that runs ``generate`` in a process of its own and gives its exit code and what it printed."""

    def run(output, struck=None, **changed):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        argv = arguments(model_folder, prompts_file, output, **changed)
        child = processes.Process(target=in_child, args=(log, argv, struck))
        child.start()
        child.join()
        return child.exitcode, log.read_text() if log.exists() else ""

    return run
