"""``warpdecode generate``: which tokens are drawn, and what a sample depends on."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from generate_runs import PROMPTS, rows_of  # noqa: E402
from warpdecode.generate.sampling import draw, token_weights, uniform  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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
