"""``warpdecode generate``: files that it does not resume, because something else would be in the rest of them."""

import json

import pytest

pytest.importorskip("transformers")

from generate_runs import OPTIONS, PROMPTS, begun_like, save_model
from warpdecode.generate.journal import Journal, meta_path
from warpdecode.generate.settings import WEIGHTS_SUFFIXES

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_file_that_another_run_writes_is_refused(run_child, generate, monkeypatch):
    append, seen = Journal.append, []

    def then_another(journal, rows):
        append(journal, rows)
        seen.append((*run_child(journal.output), journal.output.read_bytes()))

    monkeypatch.setattr(Journal, "append", then_another)
    code, path, _ = generate()
    assert code == 0 and len(seen) == 4, "one for each batch"
    for code, said, content in seen:
        assert code == 1 and "is being written by another run" in said
        assert path.read_bytes().startswith(content), "the other run wrote nothing"
