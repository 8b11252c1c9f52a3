"""``warpdecode generate``: the samples it draws, and the file they are in, whatever happened while it was written.

The model is a real, tiny Qwen3-MoE with random weights: its samples are long and varied, where the demo's are all but
certain. Everything runs through the command line's ``main``, most of it in this process. What has to be killed runs in
processes forked from a server that has imported torch once.
"""

import fcntl
import json
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from warpdecode import cli, demo, hf  # noqa: E402
from warpdecode.generate.journal import meta_path  # noqa: E402
from warpdecode.generate.prompts import read_prompts  # noqa: E402
from warpdecode.generate.report import Report  # noqa: E402
from warpdecode.generate.sampling import draw, token_weights, uniform  # noqa: E402
from warpdecode.generate.settings import WEIGHTS_SUFFIXES  # noqa: E402

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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread: for so small a model more only wait for each other, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_model(folder, **generation):
    """Save a tiny random model; the demo's tokenizer has its vocabulary."""
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


# What is in the file


def test_lines_are_samples_in_order(reference):
    rows = rows_of(reference)
    assert [(row["prompt"], row["sample"]) for row in rows] == [(prompt, n) for prompt in PROMPTS for n in range(3)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_path())
    for row in rows:
        assert list(row) == ["prompt", "sample", "text", "token_ids", "logprobs"]
        assert len(row["token_ids"]) == len(row["logprobs"]) <= 12
        assert EOS not in row["token_ids"][:-1]
        assert len(row["token_ids"]) == 12 or row["token_ids"][-1] == EOS
        assert row["text"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
        assert "<eos>" not in row["text"]
    lengths = {len(row["token_ids"]) for row in rows}
    assert len(lengths) > 2, "samples of several lengths were expected, or ending is not tested"


def test_logprobs_are_those_of_a_teacher_forced_model_at_temperature_1(generate, model_folder):
    """Whatever the sampling settings: a trainer recomputes them from the logits alone."""
    _, path, _ = generate(temperature=0.6, top_p=0.8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = hf.patch(transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32))
    for row in rows_of(path):
        prompt = tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row["token_ids"]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(-1, torch.tensor(row["token_ids"])[:, None])[:, 0]
        # Attention over a cache with padding rounds differently from one over the whole: some units in the last place
        # of float32 logits of size 10, which are 1e-6 each.
        torch.testing.assert_close(torch.tensor(row["logprobs"], dtype=torch.float64), expected, rtol=0, atol=2e-5)


def test_temperature_0_is_greedy(generate, model_folder):
    _, path, _ = generate(temperature=0, samples=1, batch_size=len(PROMPTS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model = hf.patch(transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32))
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = model.generate(**batch, do_sample=False, max_new_tokens=12)[:, batch["input_ids"].shape[1] :]
    for row, ids in zip(rows_of(path), output.tolist(), strict=True):
        assert row["token_ids"] == ids[: len(row["token_ids"])]
        assert set(ids[len(row["token_ids"]) :]) <= {0}, "the rest is padding"


def test_every_end_of_sequence_token_of_a_list_ends_a_sample(generate, tmp_path):
    ends = [EOS, 5, 9]
    _, path, _ = generate(model=save_model(tmp_path / "model", eos_token_id=ends))
    lasts = []
    for row in rows_of(path):
        assert not set(ends) & set(row["token_ids"][:-1])
        lasts.append(row["token_ids"][-1])
    assert {5, 9} & set(lasts)


def test_the_checkpoints_own_sampling_settings_take_no_part(generate, reference, tmp_path):
    folder = save_model(tmp_path / "model", repetition_penalty=5.0, suppress_tokens=[5, 6], do_sample=True, top_k=2)
    _, path, _ = generate(model=folder)
    assert path.read_bytes() == reference.read_bytes()


def test_logits_that_are_not_finite_end_the_run(generate, model_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    code, path, printed = generate(model=tmp_path / "model")
    assert code == 1 and "logits are not finite" in printed and "12+34=" in printed
    assert path.read_bytes() == b""


def test_strict_refuses_a_model_whose_layers_cannot_be_served(generate, tmp_path):
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    code, path, printed = generate(model=folder, flags=["--strict"])
    assert code == 1 and "warpdecode generate: error: " in printed and "Nothing was patched (strict=True)" in printed
    assert path.read_bytes() == b""
    with pytest.warns(hf.WarpDecodeFallbackWarning):
        code, path, printed = generate(model=folder)
    assert code == 0 and "0 of 2 layers take warp_decode" in printed and lines_in(path) == 15


# Which tokens are drawn


def test_uniform_numbers_never_change():
    """Files of an earlier version have to resume with the same numbers."""
    assert uniform(0, 0, 0, 0) == 0.5421120988313992
    assert uniform(1, 2, 3, 4) == 0.3788145805510379


def test_uniform_numbers_are_uniform_and_differ_in_every_coordinate():
    numbers = [uniform(0, 1, 2, step) for step in range(20000)]
    assert all(0 <= number < 1 for number in numbers)
    for share in (0.1, 0.5, 0.9):  # five standard deviations of a binomial are below 0.018
        assert abs(sum(number < share for number in numbers) / 20000 - share) < 0.018
    points = [(s, p, n, t) for s in (0, 1, 11) for p in (0, 1, 11) for n in (0, 1, 11) for t in (0, 1, 11)]
    assert len({uniform(*point) for point in points}) == len(points)


LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0, -float("inf"), 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_in_proportion_to_the_tempered_softmax(temperature):
    uniforms = torch.tensor([uniform(0, 0, 0, step) for step in range(20000)], dtype=torch.float64)
    tokens = draw(token_weights(LOGITS, temperature, 1.0).expand(20000, -1), uniforms)
    shares = torch.bincount(tokens[:, 0], minlength=6) / 20000
    expected = (LOGITS[0] / temperature).softmax(-1).float()
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.018)
    assert shares[4] == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = torch.tensor([[0.1, 0.4, 0.1, 0.3, 0.1]], dtype=torch.float64)
    for top_p, kept in [(0.3, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [0, 1, 3]), (0.95, [0, 1, 2, 3, 4])]:
        weights = token_weights(probabilities.log(), 1.0, top_p)
        assert weights[0].nonzero()[:, 0].tolist() == kept, top_p
    unchanged = token_weights(probabilities.log(), 1.0, 1.0)
    assert torch.equal(weights, unchanged)


def test_draw_stays_inside_the_distribution_at_its_ends():
    weights = torch.tensor([[0, 2**40, 0, 2**40, 0]])
    ends = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights.expand(4, -1), ends)[:, 0].tolist() == [1, 1, 3, 3]
    many = torch.full((1, 2**18), 2**40)  # a total of 2**58, which float64 cannot hold to the unit
    assert draw(many, ends[3:])[0, 0] == 2**18 - 1


def test_tiny_temperatures_and_top_p_are_greedy(generate):
    _, greedy, _ = generate("greedy.jsonl", temperature=0)
    for output, changed in [("cold.jsonl", {"temperature": 1e-310}), ("narrow.jsonl", {"top_p": 1e-9})]:
        code, path, _ = generate(output, **changed)
        assert code == 0 and path.read_bytes() == greedy.read_bytes()


def test_top_p_and_temperature_and_seed_change_the_samples(generate, reference):
    tokens = {"reference": [row["token_ids"] for row in rows_of(reference)]}
    for name, changed in [("a", {"top_p": 0.6}), ("b", {"temperature": 0.7}), ("c", {"seed": 1})]:
        tokens[name] = [row["token_ids"] for row in rows_of(generate(f"{name}.jsonl", **changed)[1])]
    names = list(tokens)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert tokens[a] != tokens[b], (a, b)


def test_samples_of_a_prompt_and_of_its_twin_differ(reference):
    twins = [tuple(row["token_ids"]) for row in rows_of(reference) if row["prompt"] == PROMPTS[0]]
    assert len(twins) == 6 and len(set(twins)) == 6


@pytest.mark.parametrize("batch_size", [1, 7, 15])
def test_a_sample_does_not_depend_on_its_batch(generate, reference, batch_size):
    """In float32 on a CPU, where other batches move the logits by some 1e-6 only: the tokens stay. Bits are promised
    for the same batch size alone."""
    _, path, _ = generate(batch_size=batch_size)
    assert [row["token_ids"] for row in rows_of(path)] == [row["token_ids"] for row in rows_of(reference)]


def test_more_samples_begin_with_the_same(generate, reference):
    _, path, _ = generate(samples=4)
    fewer = [row["token_ids"] for row in rows_of(path) if row["sample"] < 3]
    assert fewer == [row["token_ids"] for row in rows_of(reference)]


# Resuming


def in_child(log, argv):
    """Run the command line in a forked child, what it prints going to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    torch.set_num_threads(1)
    os._exit(cli.main(argv))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warpdecode.generate.command", "transformers.models.qwen3_moe.modeling_qwen3_moe"])
    return context


def wait_until(condition, process):
    end = time.monotonic() + 60
    while not condition() and process.is_alive():
        assert time.monotonic() < end, "nothing happened in a minute"
        time.sleep(0.002)


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments_the_file_is_that_of_an_uninterrupted_run(
    processes, generate, model_folder, prompts_file, tmp_path
):
    settings = {"samples": 12, "max_new_tokens": 16}
    code, whole, _ = generate("whole.jsonl", **settings)
    assert code == 0 and lines_in(whole) == 60
    output, chance, kills = tmp_path / "killed.jsonl", random.Random(time.time_ns()), []
    argv = arguments(model_folder, prompts_file, output, **settings)
    for batches in (0, 1, 3, 2):
        child = processes.Process(target=in_child, args=(tmp_path / "log", argv))
        child.start()
        # The first kill before or in the first batch, the others some batches later and anywhere inside one.
        goal = lines_in(output) + 4 * batches
        wait_until(lambda: output.exists() and lines_in(output) >= goal, child)  # noqa: B023
        time.sleep(chance.uniform(0, 0.1))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills.append(lines_in(output))
    assert kills[-1] < 60, kills
    assert cli.main(arguments(model_folder, prompts_file, output, **settings)) == 0
    assert output.read_bytes() == whole.read_bytes(), kills


CUTS = ["nothing", "in the first line", "in a line", "before a newline", "inside a batch", "the last newline"]


@pytest.mark.parametrize("cut", CUTS)
def test_cut_anywhere_the_file_is_completed_to_the_same_bytes(generate, reference, tmp_path, cut):
    whole = reference.read_bytes()
    lines = whole.splitlines(keepends=True)
    content = {
        "nothing": b"",
        "in the first line": lines[0][:9],
        "in a line": b"".join(lines[:7]) + lines[7][:30],
        "before a newline": b"".join(lines[:8])[:-1],
        "inside a batch": b"".join(lines[:6]),
        "the last newline": whole[:-1],
    }[cut]
    begun_like(reference, tmp_path / "out.jsonl", content)
    code, path, printed = generate()
    assert code == 0 and "is complete: it has all 15 samples" in printed
    assert path.read_bytes() == whole


def test_a_cut_inside_a_character_of_a_prompt(generate, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "1+2\u2028=\U0001f600\u00e9"}), encoding="utf-8")
    code, path, _ = generate(prompts=prompts, samples=2, batch_size=1)
    whole = path.read_bytes()
    assert code == 0 and len(whole.decode("utf-8").splitlines()) == 2, "any way of splitting lines gives the samples"
    path.write_bytes(whole[: len(whole) // 2 + 20])
    code, path, _ = generate(prompts=prompts, samples=2, batch_size=1)
    assert code == 0 and path.read_bytes() == whole


def test_a_complete_file_is_left_alone(generate, reference, tmp_path):
    begun_like(reference, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").stat()
    code, path, printed = generate(flags=["--compare"])
    assert code == 0 and "is complete" in printed and "Nothing was done" in printed and "tokens/s" not in printed
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.read_bytes() == reference.read_bytes()


OTHERS = {"samples": 2, "batch_size": 5, "max_new_tokens": 13, "temperature": 0.5, "top_p": 0.9, "seed": 7}


@pytest.mark.parametrize("name, value", [*OTHERS.items(), ("dtype", "bfloat16")])
def test_other_options_are_refused(generate, reference, tmp_path, name, value):
    lines = reference.read_bytes().splitlines(keepends=True)
    option = name.replace("_", "-")
    was = json.dumps(OPTIONS["--" + option])
    for written in (0, 5, 15):  # just begun, in the middle, complete
        content = b"".join(lines[:written])
        begun_like(reference, tmp_path / "out.jsonl", content)
        code, path, printed = generate(**{name: value})
        assert code == 1
        assert f"begun with other settings: {option} was {was} and is now {json.dumps(value)}. " in printed
        assert path.read_bytes() == content and meta_path(path).read_bytes() == meta_path(reference).read_bytes()


def test_every_differing_setting_is_named(generate, reference, tmp_path):
    begun_like(reference, tmp_path / "out.jsonl")
    _, _, printed = generate(seed=1, top_p=0.5)
    assert "top-p was 1.0 and is now 0.5; seed was 0 and is now 1. " in printed


def test_every_recorded_setting_is_compared(generate, reference, tmp_path):
    meta = json.loads(meta_path(reference).read_text())
    recorded = list(meta["settings"])
    assert {"warpdecode numerics", "warpdecode version", "device", "dtype", "prompts hash", "format"} <= set(recorded)
    for name in recorded:
        begun_like(reference, tmp_path / "out.jsonl")
        other = {**meta, "settings": {**meta["settings"], name: "another"}}
        meta_path(tmp_path / "out.jsonl").write_text(json.dumps(other))
        code, _, printed = generate()
        assert code == 1 and f'begun with other settings: {name} was "another" and is now' in printed, name


def test_settings_that_only_one_version_records_are_refused(generate, reference, tmp_path):
    begun_like(reference, tmp_path / "out.jsonl")
    meta = json.loads(meta_path(reference).read_text())
    meta["settings"]["top-k"] = 3
    del meta["settings"]["seed"]
    meta_path(tmp_path / "out.jsonl").write_text(json.dumps(meta))
    code, _, printed = generate()
    assert code == 1 and "seed was not recorded and is now 0; top-k was 3 and is now not recorded. " in printed


@pytest.mark.parametrize("new", [["12+34=", "7+8=", "999+1=", "12+34=", "250+251="], PROMPTS[:4]])
def test_other_prompts_are_refused(generate, reference, tmp_path, new):
    begun_like(reference, tmp_path / "out.jsonl")
    (tmp_path / "new.txt").write_text("\n".join(new))
    code, _, printed = generate(prompts=tmp_path / "new.txt")
    assert code == 1 and "prompts hash was" in printed


def test_the_same_prompts_in_another_form_are_the_same(generate, reference, tmp_path):
    begun_like(reference, tmp_path / "out.jsonl")
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n\n" for prompt in PROMPTS))
    assert generate(prompts=tmp_path / "same.jsonl")[0] == 0


@pytest.mark.parametrize("changed", [WEIGHTS_SUFFIXES[0], "generation_config.json", "tokenizer.json"])
def test_another_model_under_the_same_name_is_refused(generate, tmp_path, changed):
    """As after a trainer's next step, which writes files of the same names and sizes."""
    folder = save_model(tmp_path / "model")
    assert generate(model=folder)[0] == 0
    (path,) = (path for path in folder.iterdir() if path.name.endswith(changed))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    code, _, printed = generate(model=folder)
    assert code == 1
    assert ("model weights was" if changed == ".safetensors" else "model config and tokenizer was") in printed


def test_a_file_of_something_else_is_refused(generate, reference, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("my notes\n")
    code, _, printed = generate()
    assert code == 1 and "no out.jsonl.meta.json beside it" in printed and output.read_text() == "my notes\n"
    begun_like(reference, output)
    meta_path(output).write_text("{}")
    code, _, printed = generate()
    assert code == 1 and "is not what warpdecode generate writes" in printed


@pytest.mark.parametrize("line", [0, 4, 14, 15])
def test_a_file_that_was_changed_is_refused(generate, reference, tmp_path, line):
    lines = reference.read_bytes().splitlines(keepends=True)
    lines[line : line + 1] = [lines[7]]
    begun_like(reference, tmp_path / "out.jsonl", b"".join(lines))
    code, path, printed = generate()
    assert code == 1 and f"out.jsonl, line {line + 1} is " in printed and "changed by something else" in printed
    assert path.read_bytes() == b"".join(lines)


def test_settings_of_a_removed_file_do_not_bind(generate, reference):
    _, path, _ = generate(seed=5)
    path.unlink()
    code, path, _ = generate()
    assert code == 0 and path.read_bytes() == reference.read_bytes()
    assert json.loads(meta_path(path).read_text())["settings"]["seed"] == 0


def test_the_settings_are_there_before_the_first_sample(processes, model_folder, prompts_file, tmp_path):
    output = tmp_path / "out.jsonl"
    child = processes.Process(target=in_child, args=(tmp_path / "log", arguments(model_folder, prompts_file, output)))
    child.start()
    wait_until(output.exists, child)
    wait_until(meta_path(output).exists, child)
    assert output.read_bytes() == b"" and json.loads(meta_path(output).read_text())["settings"]["seed"] == 0
    child.kill()
    child.join()


def test_a_file_that_another_run_writes_is_refused(processes, generate, model_folder, prompts_file, tmp_path):
    output = tmp_path / "out.jsonl"
    argv = arguments(model_folder, prompts_file, output, samples=1000)
    child = processes.Process(target=in_child, args=(tmp_path / "log", argv))
    child.start()
    wait_until(lambda: lines_in(output), child)
    code, _, printed = generate(samples=1000)
    child.kill()
    child.join()
    assert code == 1 and "is being written by another run" in printed
    with output.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock went with the process


def test_ctrl_c_says_how_to_resume(processes, generate, model_folder, prompts_file, tmp_path):
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    argv = arguments(model_folder, prompts_file, output, samples=20)
    child = processes.Process(target=in_child, args=(log, argv))
    child.start()
    wait_until(lambda: lines_in(output), child)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode == 130, log.read_text()
    said = log.read_text()
    assert f"Interrupted: {lines_in(output)} of 100 samples are in {output}. Run the same command again" in said
    assert "Traceback" not in said and 0 < lines_in(output) < 100
    assert generate(samples=20)[0] == 0 and lines_in(output) == 100


def test_a_full_disk_ends_the_run_and_the_same_command_resumes(generate, reference):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # stops in the middle of a write
    try:
        code, path, printed = generate()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and "out.jsonl cannot be written: File too large; what was written is kept" in printed
    assert path.read_bytes() == reference.read_bytes()[:3000]
    code, path, _ = generate()
    assert code == 0 and path.read_bytes() == reference.read_bytes()


# Prompts files


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("p.txt", 'a\nb b \r\n\n{"prompt": 1}\n', ["a", "b b ", '{"prompt": 1}']),
        ("p.jsonl", '{"prompt": "a\\nb", "answer": 3}\n\n{"prompt": " c"}', ["a\nb", " c"]),
        ("p", '\n{"prompt": "a"}\n{"prompt": "b"}\n', ["a", "b"]),
        ("p", '{"prompt"\n"quoted"\n[1]', ['{"prompt"', '"quoted"', "[1]"]),
        ("p.txt", "\ufeffa\u2028b\n", ["a\u2028b"]),
    ],
)
def test_prompts_are_read(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("p.jsonl", b'{"prompt": "a"}\nb\n', "p.jsonl, line 2 is not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\n["b"]\n', "p.jsonl, line 3 is a JSON list; an object"),
        ("p.jsonl", b'{"text": "a"}\n', "p.jsonl, line 1 has the fields ['text']; a 'prompt' field was expected"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "p.jsonl, line 2 has a 'prompt' of type int; a string"),
        ("p.jsonl", b'{"prompt": "a \\ud800"}', "p.jsonl, line 1 has a 'prompt' with half a character ('\\ud800')"),
        ("p", b'{"prompt": "a"}\nplain\n', "p, line 2 is not JSON"),
        ("p.txt", b"a\n\xff\n", "p.txt, line 2 is not UTF-8"),
        ("p.txt", b"\n \n", "has no prompts; at least one was expected"),
        ("p.jsonl", b'{"prompt": ""}\n', "prompt 0 ('') has no tokens; at least one was expected"),
    ],
)
def test_errors_in_prompts_files_name_the_line(generate, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    code, path, printed = generate(prompts=tmp_path / name)
    assert code == 1 and sentence in printed
    assert not path.exists() or path.read_bytes() == b""


def test_files_that_cannot_be_opened(generate, tmp_path):
    code, _, printed = generate(prompts=tmp_path / "none.txt")
    assert code == 1 and "none.txt cannot be read: No such file" in printed
    code, _, printed = generate("no/such/folder.jsonl")
    assert code == 1 and "folder.jsonl cannot be opened: No such file" in printed
    os.mkfifo(tmp_path / "fifo")
    code, _, printed = generate("fifo")
    assert code == 1 and "fifo is not a regular file" in printed
    (tmp_path / "empty").mkdir()
    code, _, printed = generate(model=tmp_path / "empty")
    assert code == 1 and "has no config.json" in printed


# Comparing


def test_compare_says_whether_the_unpatched_model_agrees(generate, reference):
    code, path, printed = generate(flags=["--compare"])
    assert code == 0 and path.read_bytes() == reference.read_bytes()
    assert "warpdecode " in printed and "transformers alone " in printed and printed.count("tokens/s") == 2
    assert "15 of 15 samples are identical" in printed  # in float32 both round far below what a draw could show
    assert "sums right" not in printed


def test_the_first_difference_is_shown():
    report = Report()
    for sample, ours, stock in [(0, [1, 2], [1, 2]), (1, [1, 2, 3], [1, 2]), (2, [4], [5])]:
        row = {"prompt": "a", "sample": sample, "text": "x"}
        report.compare({**row, "token_ids": ours}, {**row, "token_ids": stock, "text": "y"})
    assert "1 of 3 samples are identical; the first difference is in sample 1 of 'a', at token 2" in report.text()
    assert "warpdecode 'x', transformers alone 'y'" in report.text()


def test_the_demo_needs_no_arguments(capfd):
    assert cli.main(["generate", "--device", "cpu"]) == 0
    printed = capfd.readouterr().out
    count = len(demo.load_prompts())
    for name in ("warpdecode", "transformers alone"):
        (line,) = (line for line in printed.splitlines() if line.startswith(name))
        right = int(line.partition(" s)   ")[2].partition(f" of {count} sums right")[0])
        assert right > 0.9 * count, line
    assert f"of {count} samples are identical" in printed


def test_the_demo_resumes_and_counts_all_sums(tmp_path, capfd):
    argv = ["generate", "--device", "cpu", "--no-compare", "--output", str(tmp_path / "demo.jsonl")]
    assert cli.main(argv) == 0
    report = capfd.readouterr().out
    whole = (tmp_path / "demo.jsonl").read_bytes()
    (tmp_path / "demo.jsonl").write_bytes(whole[: len(whole) // 2])
    assert cli.main(argv) == 0
    assert (tmp_path / "demo.jsonl").read_bytes() == whole
    sums = report.partition("tokens in")[2].partition(" s)")[2]
    assert "sums right" in sums and sums in capfd.readouterr().out
    assert cli.main(argv) == 0 and "Nothing was done" in capfd.readouterr().out
