"""``warpdecode generate``: models that cannot be loaded as a whole, or have not the room to run."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from generate_runs import lines_in, save_model  # noqa: E402
from warpdecode.generate.rollout import Rollout  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def rewritten(folder, change):
    """A saved model whose weights, by their names, went through ``change``."""
    file = save_model(folder) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def drop(*names):
    return lambda weights: [weights.pop(name) for name in names]


NORMS = [f"model.layers.{layer}.{name}_layernorm.weight" for layer in (0, 1) for name in ("input", "post_attention")]


def test_missing_weights_are_not_made_up(generate, tmp_path):
    """transformers would fill them with random numbers, other ones in every run."""
    code, path, printed = generate(model=rewritten(tmp_path / "one", drop("lm_head.weight")))
    assert code == 1 and lines_in(path) == 0
    assert "lack the weights lm_head.weight; all were expected" in printed
    code, _, printed = generate("other.jsonl", model=rewritten(tmp_path / "four", drop(*NORMS)))
    assert code == 1 and f"lack the weights {', '.join(sorted(NORMS)[:3])} and 1 more; all were expected" in printed


def test_tied_weights_are_not_missing(generate, tmp_path):
    """A head that is the embedding is in no file."""
    folder = save_model(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert generate(model=folder)[0] == 0


def test_weights_of_another_shape(generate, tmp_path):
    def shorten(weights):
        weights["lm_head.weight"] = weights["lm_head.weight"][:10].clone()

    folder = rewritten(tmp_path / "model", shorten)
    code, _, printed = generate(model=folder)
    assert code == 1 and f"error: the model {folder} cannot be loaded: " in printed


def test_a_truncated_file(generate, tmp_path):
    folder = save_model(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, _, printed = generate(model=folder)
    assert code == 1 and f"error: the model {folder} cannot be loaded: " in printed


def test_a_folder_without_a_tokenizer_is_refused_before_its_weights_are_loaded(generate, tmp_path):
    folder = save_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "model.safetensors").write_bytes(b"not looked at")
    code, _, printed = generate(model=folder)
    assert code == 1 and "prompt 0 ('12+34=') has no tokens; at least one was expected" in printed
    assert f"the tokenizer of {folder} knows" in printed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_too_little_memory_names_the_batch_size(generate, monkeypatch, error):
    def full(*_, **__):
        raise error("there is no more")

    monkeypatch.setattr(Rollout, "_generate", full)
    code, _, printed = generate(batch_size=5)
    assert code == 1 and "cpu is too small for --batch-size 5 and --max-new-tokens 12: there is no more" in printed
