"""Sampling: distributions match exact probabilities, and rows do not affect each other."""

import math

import numpy as np
import pytest
import torch

from prefixstore.engine import SamplingParams
from prefixstore.engine.sampler import NoToken, SamplingRow, sample_tokens

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOGITS = torch.tensor([1.5, -0.5, 2.0, 0.25, 2.0, -1.75, 1.0, 0.0, -1.0, 2.75, -math.inf, 0.5])

CASES = {
    "plain": SamplingParams(),
    "cool": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=2.0),
    "top k": SamplingParams(top_k=4),
    "top p": SamplingParams(top_p=0.75),
    "narrow top p": SamplingParams(top_p=0.3, temperature=1.3),
    "top p of top k": SamplingParams(top_k=6, top_p=0.7, temperature=1.5),
}


def sample(logits, params, seeds=None, positions=None):
    """Sample rows, each with its own parameters; by default seeds count up and positions are 0."""
    seeds = range(len(params)) if seeds is None else seeds
    positions = [0] * len(params) if positions is None else positions
    rows = [SamplingRow(*row) for row in zip(params, seeds, positions, strict=True)]
    return [one.token_id for one in sample_tokens(logits, rows)]


def exact_probabilities(logits, params):
    """The exact distribution, computed step by step, `[vocab_size]`, float64."""
    scores = logits.double() / params.temperature
    if params.top_k:
        scores[scores < scores.sort(descending=True).values[params.top_k - 1]] = -math.inf
    probabilities = scores.softmax(dim=-1)
    above = torch.stack([probabilities[probabilities > one].sum() for one in probabilities])
    probabilities[above >= params.top_p] = 0
    return (probabilities / probabilities.sum()).numpy()


def assert_drawn_from(probabilities, counts):
    """Chi-square test: correct code fails for one choice of seeds in 30,000."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    assert expected.min() > 5
    degrees = len(expected) - 1
    found = ((counts[possible] - expected) ** 2 / expected).sum()
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is about normal.
    spread = 2 / (9 * degrees)
    assert ((found / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4


@pytest.mark.parametrize("params", CASES.values(), ids=CASES)
def test_draws_from_the_exact_distribution(params, device):
    num_draws = 20_000
    logits = LOGITS.to(device).expand(num_draws, -1)
    drawn = sample(logits, [params] * num_draws, seeds=[7] * num_draws, positions=range(num_draws))
    counts = np.bincount(drawn, minlength=len(LOGITS))
    assert_drawn_from(exact_probabilities(LOGITS, params), counts)


@pytest.mark.parametrize(
    ("seed", "expected"), [(42, [52, 13, 27, 18, 30]), (-1, [15, 44, 16, 37, 28])]
)
def test_a_seed_gives_the_same_tokens_forever(seed, expected, device):
    """The tokens are written down here, so that a change of our code or NumPy's shows."""
    logits = torch.zeros(5, 64, device=device)
    assert sample(logits, [SamplingParams()] * 5, [seed] * 5, range(5)) == expected


@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_one_token_says_nothing_of_the_next(varied, device):
    num_draws = 8_000
    numbers = {"seeds": [3] * num_draws, "positions": [5] * num_draws}
    numbers[varied] = range(-num_draws // 2, num_draws // 2) if varied == "seeds" else range(8_000)
    logits = torch.zeros(num_draws, 4, device=device)
    drawn = np.array(sample(logits, [SamplingParams()] * num_draws, **numbers))
    pairs = np.bincount(drawn[0::2] * 4 + drawn[1::2], minlength=16)
    assert_drawn_from(np.full(16, 1 / 16), pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_see_the_rows_beside_it(dtype, device):
    rng = np.random.default_rng(0)
    # An odd vocabulary, so that rows begin at any alignment; enough rows for several threads.
    logits = torch.from_numpy(rng.normal(size=(24, 40_007)) * 3).to(device, dtype)
    params = [
        SamplingParams(
            temperature=float(rng.choice([0, 0.5, 1.0, 1.7])),
            top_k=int(rng.choice([0, 0, 1, 30, 3000])),
            top_p=float(rng.choice([1.0, 0.95, 0.4])),
            logprobs=int(rng.integers(4)),
        )
        for _ in range(24)
    ]
    rows = [SamplingRow(one, seed=100 + at, position=at) for at, one in enumerate(params)]
    together = sample_tokens(logits, rows)
    alone = [sample_tokens(logits[at : at + 1], [row])[0] for at, row in enumerate(rows)]
    assert together == alone
    order = rng.permutation(24).tolist()
    shuffled = sample_tokens(logits[order], [rows[at] for at in order])
    assert shuffled == [together[at] for at in order]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [5, 40_007])
def test_greedy_takes_the_first_of_equals(dtype, vocab_size, device):
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.integers(-9, 9, (16, vocab_size)))
    expected = [row.index(max(row)) for row in logits.tolist()]
    greedy = SamplingParams(temperature=0)
    assert sample(logits.to(device, dtype), [greedy] * 16) == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-3),
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=5e-324),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-6),
        SamplingParams(top_p=5e-324),
    ],
    ids=str,
)
def test_narrow_wishes_leave_the_most_likely_token(params, device):
    logits = torch.randn(64, 5000, device=device) * 4
    assert sample(logits, [params] * 64) == logits.argmax(dim=-1).tolist()


def test_top_p_of_a_flat_distribution_stays_inside(device):
    num_draws = 500
    logits = torch.linspace(0, 0.01, 4000, device=device)[torch.randperm(4000, device=device)]
    inside = set(logits.topk(41).indices.tolist())
    drawn = sample(logits.expand(num_draws, -1), [SamplingParams(top_p=0.01)] * num_draws)
    assert set(drawn) <= inside
    assert len(set(drawn)) > 35


def test_equals_of_the_last_token_kept_are_kept_too(device):
    logits = torch.zeros(300, 6, device=device)
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=0.1)):
        assert set(sample(logits, [params] * 300)) == set(range(6))


def test_a_token_ruled_out_is_never_taken(device):
    logits = torch.full((200, 1000), -math.inf, device=device)
    logits[:, 417] = -1e4
    for params in (SamplingParams(), SamplingParams(top_k=20, top_p=0.9, temperature=2.0)):
        assert sample(logits, [params] * 200) == [417] * 200


def test_double_precision_reaches_beyond_single(device):
    logits = torch.tensor([[1e300, 1e300, -1e300]], dtype=torch.float64, device=device)
    rows = [SamplingRow(SamplingParams(logprobs=2), 0, position) for position in range(50)]
    tokens = sample_tokens(logits.expand(50, -1), rows)
    assert {one.token_id for one in tokens} == {0, 1}
    assert tokens[0].logprob.logprob == pytest.approx(math.log(0.5))


def test_top_k_beyond_the_vocabulary_keeps_all(device):
    logits = torch.zeros(300, 6, device=device)
    assert set(sample(logits, [SamplingParams(top_k=7)] * 300)) == set(range(6))


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_a_row_without_a_choice_spoils_no_other(temperature, value, shown, device):
    logits = torch.randn(4, 70, device=device)
    params = SamplingParams(temperature=temperature, top_k=20, top_p=0.9, logprobs=2)
    rows = [SamplingRow(params, seed=at, position=0) for at in range(4)]
    expected = sample_tokens(logits, rows)
    if value == -math.inf:
        logits[2] = value
    else:
        logits[2, 33] = value
    tokens = sample_tokens(logits, rows)
    assert isinstance(tokens[2], NoToken)
    assert str(tokens[2]) == f"logits: expected a finite largest one, got {shown}"
    tokens[2] = expected[2]
    assert tokens == expected
    (alone,) = sample_tokens(logits[2:3], rows[2:3])
    assert isinstance(alone, NoToken)


def test_gives_log_probabilities_before_temperature(device):
    params = SamplingParams(temperature=0.3, top_k=2, logprobs=4)
    (token,) = sample_tokens(LOGITS.to(device).unsqueeze(0), [SamplingRow(params, 1, 0)])
    expected = LOGITS.log_softmax(dim=-1)
    assert token.logprob.token_id == token.token_id
    assert token.logprob.logprob == pytest.approx(expected[token.token_id].item(), abs=1e-6)
    ids, values = zip(*token.logprob.top, strict=True)
    assert ids == (9, 2, 4, 0)  # 2 and 4 are equal
    assert values == pytest.approx(expected[list(ids)].tolist(), abs=1e-6)


def test_gives_as_many_log_probabilities_as_asked(device):
    logits = LOGITS.to(device).expand(3, -1)
    params = [SamplingParams(temperature=0, logprobs=one) for one in (None, 0, 20)]
    rows = [SamplingRow(one, 0, 0) for one in params]
    without, alone, most = (one.logprob for one in sample_tokens(logits, rows))
    assert without is None
    assert alone.top == ()
    assert len(most.top) == 11  # one of the twelve is ruled out


@pytest.mark.parametrize("logprobs", [-1, 21, True, 1.0])
def test_refuses_other_numbers_of_log_probabilities(logprobs):
    with pytest.raises(ValueError, match="logprobs: expected"):
        SamplingParams(logprobs=logprobs)


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(3, 4), torch.zeros(2, 4, dtype=torch.int64)], ids=str
)
def test_refuses_logits_that_do_not_fit_the_rows(logits):
    with pytest.raises(ValueError, match=r"logits: expected floats of shape \[2, vocab_size\]"):
        sample(logits, [SamplingParams()] * 2)


def test_no_rows_give_no_tokens():
    assert sample_tokens(torch.empty(0, 8), []) == []
