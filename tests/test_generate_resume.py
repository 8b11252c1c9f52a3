"""``warpdecode generate``: the file is that of an uninterrupted run, however often writing it was interrupted."""

import json
import os
import random
import resource
import signal
import time

import pytest

pytest.importorskip("transformers")

from generate_runs import PROMPTS, arguments, begun_like, in_child, lines_in, wait_until
from warpdecode import cli
from warpdecode.generate.journal import meta_path

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_same_prompts_in_another_form_are_the_same(generate, reference, tmp_path):
    begun_like(reference, tmp_path / "out.jsonl")
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n\n" for prompt in PROMPTS))
    assert generate(prompts=tmp_path / "same.jsonl")[0] == 0


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
