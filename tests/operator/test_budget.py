"""The rule `budget`: estimated errors, prices, and what rows get for what they may cost."""

from __future__ import annotations

import math

import pytest
import torch

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_kernels.allocation import prices
from psa_kernels.allocation.budget import allocate_budget
from psa_kernels.allocation.prices import HIGHEST_PRICE, STEPS_PER_OCTAVE, upgrade_prices
from psa_kernels.costs import most_attended, row_budget, unit_costs
from psa_kernels.importance.reference import block_importance
from psa_kernels.layout import make_layout


def budget_spec(density=0.25, **changes):
    settings = {"block_query": 32, "block_key": 16, "levels": (1, 2, 4)} | changes
    return AttentionSpec(rule="budget", density=density, **settings)


def random_prices(levels, shape, seed):
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, HIGHEST_PRICE, (levels, *shape), generator=draw)
    return steps.cumsum(0).clamp(max=HIGHEST_PRICE).sort(0).values.to(torch.int16)


@pytest.mark.parametrize(
    ("rest", "how", "read"),
    [("skip", Importance(), 8), ("mean", Importance("sampled", "mean", 4, 8), 4), ("skip", Importance("pooled"), 1)],
    ids=str,
)
def test_errors_are_those_of_the_formula(rest, how, read):
    torch.manual_seed(3)
    spec = budget_spec(levels=(1, 2, 8), rest=rest, importance=how)
    q, k, v = (torch.randn(1, 70, 2, 8, dtype=torch.float64) for _ in range(3))
    importance = torch.rand(1, 2, 3, 5, dtype=torch.float64)
    found = prices._errors(*(x[0].transpose(0, 1) for x in (q, k, v)), importance[0], spec)
    for head in range(2):
        queries, keys, values = (x[0, :, head] for x in (q, k, v))
        blocks = [slice(start, min(start + 16, 70)) for start in range(0, 70, 16)]
        for i in range(3):
            mass = importance[0, head, i] / importance[0, head, i].sum()
            energy = queries[i * 32 : (i + 1) * 32 : read].square().mean(0)
            output = sum(share * values[block].mean(0) for share, block in zip(mass, blocks, strict=True))
            for j, block in enumerate(blocks):
                distance = (values[block].mean(0) - output).square().sum()
                factors = (1, 2, 8) if rest == "skip" else (1, 2, 8, 16)
                for level, factor in enumerate(factors):
                    spreads = []
                    for x in (keys[block], values[block]):
                        groups = [x[start : start + factor] for start in range(0, len(x), factor)]
                        deviations = torch.cat([group - group.mean(0) for group in groups])
                        spreads.append(deviations.square().mean(0))
                    noise, spread = energy @ spreads[0], spreads[1].sum()
                    error = prices.COVARIANCE * factor / 16 * noise * spread + noise**2 * distance / 4
                    expected = error * mass[j] ** prices.EXPONENT
                    assert found[level, head, i, j] == pytest.approx(expected.item(), abs=1e-12)
                if rest == "skip":
                    assert found[3, head, i, j] == pytest.approx((distance * mass[j] ** prices.EXPONENT).item())


@pytest.mark.parametrize(
    ("lead", "read"), [(0, [0, 8, 16]), (5, [0, 3, 11]), (8, [0, 8]), (15, [0, 1]), (23, [0])], ids=str
)
def test_the_energy_of_a_block_that_begins_later_is_of_the_first_query_of_each_group(lead, read):
    queries = torch.randn(2, 24 - lead if lead else 20, 8, dtype=torch.float64)
    found = prices.query_energy(queries, budget_spec(), lead)
    torch.testing.assert_close(found, queries[:, read].square().mean(1, keepdim=True))


def test_the_constants_of_the_error_model_can_be_chosen():
    torch.manual_seed(6)
    q, k, v = (torch.randn(2, 64, 8, dtype=torch.float64) for _ in range(3))
    importance = torch.rand(2, 2, 4, dtype=torch.float64)
    tuned, fitted = (prices._errors(q, k, v, importance, budget_spec(error_model=name)) for name in ("tuned", "fitted"))
    mass = importance / importance.sum(-1, keepdim=True)
    # Skipping has no constant but the exponent; of pooling the two terms have one each.
    torch.testing.assert_close(fitted[3] / tuned[3], mass ** (2.3 - 1.4))
    squares = tuned[1:3] / mass**1.4, fitted[1:3] / mass**2.3
    first = (squares[0] - squares[1] * (0.25 / 0.06)) / (16 - 2 * 0.25 / 0.06)
    second = (squares[0] - 16 * first) / 0.25
    torch.testing.assert_close(squares[1], 2 * first + 0.06 * second)
    assert (first > 0).all() and (second > 0).all()
    with pytest.raises(ValueError, match="error_model='learned'"):
        budget_spec(error_model="learned")


@pytest.mark.parametrize("rest", ["skip", "mean"])
def test_a_price_buys_the_level_that_errs_least_for_what_it_costs(rest):
    torch.manual_seed(0)
    spec = budget_spec(levels=(1, 2, 4, 8), rest=rest)
    errors = torch.rand(5, 400, dtype=torch.float64) * torch.tensor([0.0, 0.1, 0.5, 0.7, 1.0])[:, None]
    costs = torch.tensor([1, 1 / 2, 1 / 4, 1 / 8, 0 if rest == "skip" else 1 / 16], dtype=torch.float64)
    bought = prices._prices(errors, spec).int()
    assert (bought.diff(dim=0) >= 0).all()
    for step in range(0, HIGHEST_PRICE, 1500):
        price = 2.0 ** ((step - HIGHEST_PRICE // 2) / STEPS_PER_OCTAVE)
        best = (errors + price * costs[:, None]).argmin(0)
        # Within a step of the rounded price both neighbours are right.
        low, high = (bought < step).sum(0), (bought < step + 1).sum(0)
        assert ((low <= best) & (best <= high)).all()


@pytest.mark.parametrize("density", [0.07, 0.1, 0.25, 0.6, 1.0])
@pytest.mark.parametrize(("levels", "rest"), [((1, 2, 4), "skip"), ((1, 2, 4, 8), "mean"), ((2, 8), "skip")])
def test_rows_spend_their_budget(levels, rest, density):
    spec = budget_spec(density, levels=levels, rest=rest)
    shape = (2, 3, 5, 40)
    given = random_prices(len(levels), shape, seed=round(density * 100))
    importance = torch.rand(shape)
    level = allocate_budget(given, importance, spec).levels()
    units = torch.tensor(unit_costs(spec))
    cost, budget = units[level].sum(-1), row_budget(spec, 40)
    assert (level.gather(-1, importance.argmax(-1, keepdim=True)) < len(levels)).all() or rest == "mean"
    dearest = int((units[:-1] - units[1:]).max())
    assert (cost <= max(budget, int(units[-2]))).all()
    assert (cost > min(budget, int(units[0]) * 40) - dearest).all()


@pytest.mark.parametrize("key_blocks", [1, 3, 7])
def test_a_budget_below_one_block_attends_the_most_important_one_alone(key_blocks):
    spec = budget_spec(0.03)
    importance = torch.rand(1, 2, 4, key_blocks)
    level = allocate_budget(random_prices(3, (1, 2, 4, key_blocks), seed=0), importance, spec).levels()
    expected = torch.full_like(level, 3).scatter_(-1, importance.argmax(-1, keepdim=True), 2)
    assert torch.equal(level, expected)


def test_a_budget_that_is_a_whole_number_is_spent_in_full():
    """0.29 x 4 x 25 is 29, though in binary the product falls short of it."""
    assert 0.29 * 4 * 25 < 29 and row_budget(budget_spec(0.29), 25) == 29


def test_lists_have_room_for_what_a_row_can_pay():
    # 0.1 of 40 blocks pays 16 at a quarter of the price.
    spec = budget_spec(0.1)
    given = torch.full((3, 1, 1, 1, 40), 5000, dtype=torch.int16)
    given[:2] = 0
    lists = allocate_budget(given, torch.ones(1, 1, 1, 40), spec)
    assert lists.ids.shape[-1] == most_attended(spec, 40) == 16
    assert lists.counts.tolist() == [[[[0, 0, 16]]]]
    assert most_attended(budget_spec(0.1, rest="mean"), 40) == 40


def test_no_exchange_between_two_blocks_would_err_less():
    torch.manual_seed(5)
    spec = budget_spec(0.3)
    errors = torch.rand(1, 1, 1, 30, 4).cumsum(-1)[..., :4].permute(4, 0, 1, 2, 3).double()
    errors[0] = 0
    given = prices._prices(errors, spec)
    importance = torch.rand(1, 1, 1, 30)
    level = allocate_budget(given, importance, spec).levels()[0, 0, 0]
    costs = torch.tensor([1, 1 / 2, 1 / 4, 0])
    table = errors[:, 0, 0, 0]
    error, cost = table.gather(0, level[None]).sum(), costs[level].sum()
    # The optimum of the same cost lies above every Lagrangian bound, and what is left over buys less than one block.
    bound = max(
        (table + price * costs[:, None]).amin(0).sum() - price * cost for price in torch.logspace(-3, 3, 400).double()
    )
    assert bound - 1e-9 <= error <= bound + table.amax()


def test_equal_blocks_share_what_there_is():
    spec = budget_spec(0.15)
    given = torch.full((3, 1, 1, 1, 40), 5000, dtype=torch.int16)
    lists = allocate_budget(given, torch.ones(1, 1, 1, 40), spec)
    assert (lists.counts[0, 0, 0] * torch.tensor([4, 2, 1])).sum() == row_budget(spec, 40)


def test_the_whole_operator():
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 210, 2, 16) for _ in range(3))
    k[:, 40:56] *= 4
    spec = budget_spec(0.3, levels=(1, 2, 4, 8), importance=Importance("sampled", "max", 8, 8))
    options = {"text_before": 4, "permutation": torch.randperm(206)}
    out, stats = psa_attention(q, k, v, spec, return_stats=True, **options)
    # A row of 13 blocks cannot spend its last eighths of a block everywhere.
    assert ((stats.density > 0.25) & (stats.density <= 0.3)).all()
    lists = select_blocks(q, k, spec, v=v, **options)
    torch.testing.assert_close(psa_attention(q, k, v, spec, lists=lists, **options), out, rtol=0, atol=0)
    whole = psa_attention(q, k, v, budget_spec(1.0), **options)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(whole, exact.transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert (out - whole).norm() < (psa_attention(q, k, v, budget_spec(0.1), **options) - whole).norm()


def test_prices_of_all_heads_are_those_of_each_alone():
    torch.manual_seed(2)
    spec = budget_spec(importance=Importance("pooled", "mean", 8, 8))
    q, k, v = (torch.randn(2, 100, 3, 8) for _ in range(3))
    layout = make_layout(100, 100, 2, 0, torch.randperm(98))
    importance = block_importance(q, k, layout, spec, 0.3)
    together = upgrade_prices(q, k, v, importance, layout, spec, 0.3)
    for head in range(3):
        part = (slice(None), slice(None), slice(head, head + 1))
        alone = upgrade_prices(q[part], k[part], v[part], importance[:, head : head + 1], layout, spec, 0.3)
        assert torch.equal(together[:, :, head : head + 1], alone)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"density": None}, "density=None"),
        ({"density": 0.0}, "density=0.0"),
        ({"density": math.nan}, "density=nan"),
        ({"density": 1.5}, "density=1.5"),
        ({"density": 0.2, "floor": 0.1}, "floor=0.1"),
        ({"density": 0.2, "similarity": (0.5, 0.5)}, "similarity="),
        ({"density": 0.2, "rule": "count"}, "density=0.2"),
        ({"density": 0.01, "rest": "mean"}, "density=0.01"),
    ],
)
def test_settings_that_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        AttentionSpec(**({"rule": "budget"} | changes))


def test_the_values_are_asked_for():
    q = torch.randn(1, 64, 1, 8)
    with pytest.raises(ValueError, match="v=None"):
        select_blocks(q, q, budget_spec())


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
@pytest.mark.parametrize(("levels", "rest"), [((1, 2, 4), "skip"), ((1, 2, 4, 8), "mean"), ((1,), "skip")], ids=str)
def test_the_density_of_a_long_call_is_met_within_one_percent(levels, rest, density):
    """Of tensors that vary slowly and of rows that differ; the last blocks of queries and of keys are ragged."""
    torch.manual_seed(4)
    spec = budget_spec(density, levels=levels, rest=rest, importance=Importance("sampled", "max", 8, 8))
    q, k, v = (torch.randn(2, n, 2, 8).cumsum(1) / 4 for n in (70, 400 * 16 - 7, 400 * 16 - 7))
    _, stats = psa_attention(q, k, v, spec, return_stats=True, implementation="reference")
    assert ((stats.density / density - 1).abs() <= 0.01).all()
