"""The demo model: it is small, it was never shown its prompts, and it gets them right."""

from __future__ import annotations

import pytest

from warpdecode import demo
from warpdecode.demo import task
from warpdecode.demo.evaluate import expert_load, generate_texts

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

# The held-out partners of 123 below 100, written down so that a change of the split is noticed.
HELD_OUT_WITH_123 = [3, 12, 30, 31, 38, 44, 53, 55, 57, 74, 75, 84, 86]


@pytest.fixture(scope="module")
def loaded():
    """The shipped model in fp32 on the CPU, and its tokenizer."""
    return demo.load(torch.float32)


@pytest.fixture(scope="module")
def rows():
    """The shipped prompts."""
    return demo.load_prompts()


@pytest.fixture(scope="module")
def texts(loaded, rows):
    """What the model writes for the shipped prompts, as one left-padded batch."""
    model, tokenizer = loaded
    return generate_texts(model, tokenizer, [row["prompt"] for row in rows])


def test_folder_is_small():
    folder = demo.model_path().parent
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts) < 3_000_000


def test_every_layer_is_a_mixture(loaded):
    model, _ = loaded
    assert model.config.model_type == "qwen3_moe"
    assert (model.config.num_hidden_layers, model.config.num_experts, model.config.num_experts_per_tok) == (4, 16, 4)
    assert all(hasattr(layer.mlp, "experts") for layer in model.model.layers)


def test_prompts_are_held_out_and_answers_right(rows):
    assert len({row["prompt"] for row in rows}) == len(rows) >= 36
    for row in rows:
        a, b = map(int, row["prompt"].removesuffix("=").split("+"))
        assert row["prompt"] == task.prompt_text(a, b)
        assert row["answer"] == str(a + b)
        assert task.is_held_out(a, b) and task.is_held_out(b, a)


def test_prompts_file_is_what_the_task_makes():
    assert demo.prompts_path().read_text(encoding="utf-8") == task.prompts_jsonl()


def test_split_keeps_a_tenth_out_and_does_not_move():
    share = sum(task.is_held_out(a, b) for a in range(0, 1000, 7) for b in range(a, 1000, 7))
    total = sum(len(range(a, 1000, 7)) for a in range(0, 1000, 7))
    assert 0.09 < share / total < 0.11
    # The model was trained on this split: another hash would turn its training pairs into "held-out" ones.
    assert [n for n in range(100) if task.is_held_out(123, n)] == HELD_OUT_WITH_123


def test_tokenizer_round_trip(loaded, rows):
    _, tokenizer = loaded
    text = rows[0]["prompt"] + task.worked_answer(12, 995)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    batch = tokenizer(["1+2=", "123+456="], padding=True)
    assert batch["input_ids"][0][:4] == [tokenizer.pad_token_id] * 4
    assert batch["attention_mask"][0] == [0] * 4 + [1] * 4


def test_accuracy_on_held_out_prompts(rows, texts):
    right = sum(demo.is_correct(row["prompt"], text) for row, text in zip(rows, texts, strict=True))
    assert right > 0.95 * len(rows)


def test_left_padding_changes_no_answer(loaded, rows, texts):
    model, tokenizer = loaded
    shortest = min(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
    assert generate_texts(model, tokenizer, [rows[shortest]["prompt"]]) == [texts[shortest]]


def test_generation_stops_at_eos(loaded, rows):
    model, tokenizer = loaded
    output = model.generate(**tokenizer(rows[0]["prompt"], return_tensors="pt"))
    assert output[0, -1] == tokenizer.eos_token_id
    assert (output == tokenizer.eos_token_id).sum() == 1


def test_every_expert_works(loaded, rows):
    model, tokenizer = loaded
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    shares = expert_load(model, batch["input_ids"], batch["attention_mask"])
    assert shares.shape == (4, 16)
    assert torch.allclose(shares.sum(dim=1), torch.ones(4))
    assert shares.min() > 0


@pytest.mark.parametrize(
    ("prompt", "text", "right"),
    [
        ("347+285=", "7+5=12, 4+8+1=13, 3+2+1=6: 632", True),
        ("347+285=", "347+285=7+5=12, 4+8+1=13, 3+2+1=6: 632<eos><pad><pad>", True),
        ("347+285=", "<pad>347+285=7+5=12, 4+8+1=13, 3+2+1=6: 632<eos>", True),
        ("347+285=", "632", True),
        ("347+285=", "7+5=12, 4+8+1=13, 3+2+1=6: 633", False),
        ("347+285=", "7+5=12, 4+8+1=13, 3+2+1=6: 6322", False),
        ("347+285=", "7+5=12, 4+8+1=13, 3+2+1=6", False),
        ("347+285=", "7+5=12, 4+8+1=13, 3+2+1=6: ", False),
        ("347+285=", "236", False),
        ("347+285=", "", False),
        ("0+0=", "0+0=0: 0", True),
    ],
)
def test_scoring(prompt, text, right):
    assert demo.is_correct(prompt, text) is right


def test_scoring_refuses_other_prompts():
    with pytest.raises(ValueError, match="not an addition"):
        demo.is_correct("What is 2+2?", "4")


@pytest.mark.parametrize(("a", "b"), [(0, 0), (7, 285), (999, 999), (999, 1), (10, 9)])
def test_worked_answer_is_right(a, b):
    assert demo.is_correct(task.prompt_text(a, b), task.worked_answer(a, b))


def test_training_writes_a_model_of_the_shipped_shape(tmp_path, loaded, capsys, monkeypatch):
    pytest.importorskip("rich")
    from warpdecode.demo import train

    monkeypatch.setattr(train, "WATCHED_PAIRS", 2)  # an untrained model answers at full length, which takes a while
    threads = torch.get_num_threads()
    try:
        train.main(["--output", str(tmp_path), "--steps", "2", "--pairs", "2"])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert "held-out sums right" in capsys.readouterr().out
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in demo.model_path().iterdir()} - {"README.md"}
    model, tokenizer = demo.load(folder=tmp_path)
    shipped, shipped_tokenizer = loaded
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    assert tokenizer.get_vocab() == shipped_tokenizer.get_vocab()
