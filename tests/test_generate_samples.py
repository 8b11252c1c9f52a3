"""``warpdecode generate``: what is in the file it writes, and whose settings decide it."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from generate_runs import EOS, PROMPTS, lines_in, rows_of, save_model  # noqa: E402
from warpdecode import demo, hf  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))
    code, path, printed = generate(model=folder, flags=["--strict"])
    assert code == 1 and "warpdecode generate: error: " in printed and "Nothing was patched (strict=True)" in printed
    assert path.read_bytes() == b""
    with pytest.warns(hf.WarpDecodeFallbackWarning):
        code, path, printed = generate(model=folder)
    assert code == 0 and "0 of 2 layers take warp_decode" in printed and lines_in(path) == 15
