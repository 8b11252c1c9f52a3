"""``warpdecode generate``: the file is that of an uninterrupted run, however often writing it was interrupted."""

import json
import random
import resource
import signal
import time

import pytest

pytest.importorskip("transformers")  # and torch, which Rollout imports

from generate_runs import PROMPTS, begun_like, lines_in
from warpdecode.generate.journal import Journal, meta_path
from warpdecode.generate.rollout import Rollout

pytestmark = pytest.mark.usefixtures("one_thread")


# Where a run is killed: some events after the nth time that the function begins. 60 samples in 15 batches; each of
# these runs writes at most the batches named here and the one that 3000 events reach.
PLACES = [
    (Journal.__init__, 1, 500),  # as the file and its settings are written
    (Journal.__init__, 1, 3000),
    (Journal.append, 1, 100),  # as a batch is written
    (Journal.append, 3, 3000),
    (Journal.append, 2, 100),
]


def test_killed_at_random_places_the_file_is_that_of_an_uninterrupted_run(run_child, generate, tmp_path):
    settings = {"samples": 12, "max_new_tokens": 16}
    code, whole, _ = generate("whole.jsonl", **settings)
    assert code == 0 and lines_in(whole) == 60
    output, chance, kills = tmp_path / "killed.jsonl", random.Random(time.time_ns()), []
    for function, nth, most in PLACES:
        later = chance.randrange(most)
        code, said = run_child(output, (signal.SIGKILL, "call", function, nth, later), **settings)
        kills.append((function.__qualname__, nth, later, lines_in(output)))
        assert code == -signal.SIGKILL, (kills, said)
    code, _, said = generate("killed.jsonl", **settings)
    assert code == 0 and "is complete: it has all 60 samples. Nothing was done" not in said, kills
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


def test_the_settings_are_there_before_the_first_sample(run_child, tmp_path):
    output = tmp_path / "out.jsonl"
    code, said = run_child(output, (signal.SIGKILL, "call", Rollout.batches, 1))
    assert code == -signal.SIGKILL, said
    assert output.read_bytes() == b"" and json.loads(meta_path(output).read_text())["settings"]["seed"] == 0


def test_ctrl_c_says_how_to_resume(run_child, generate, tmp_path):
    output = tmp_path / "out.jsonl"
    code, said = run_child(output, (signal.SIGINT, "return", Journal.append, 2), samples=20)
    assert code == 130 and lines_in(output) == 8, said
    assert f"Interrupted: 8 of 100 samples are in {output}. Run the same command again" in said
    assert "Traceback" not in said
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
