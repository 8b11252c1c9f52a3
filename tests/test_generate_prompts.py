"""``warpdecode generate``: the prompts files it reads, and what it says of files it cannot use."""

import os

import pytest

pytest.importorskip("transformers")

from warpdecode.generate.prompts import read_prompts

pytestmark = pytest.mark.usefixtures("one_thread")


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
