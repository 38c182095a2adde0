"""Order of an epoch: which samples each reader uses, for every number of ranks, workers, blocks and resumed runs."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reading import index_of

from imagenet_shards import Index
from imagenet_train import Division, LoaderConfig, count_batches, count_steps, permute_blocks, plan_epoch, plan_reader

pytestmark = pytest.mark.quick

LAYOUTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=8)  # shards of blocks
DIVISIONS = st.builds(
    Division, st.booleans(), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.sampled_from([0, 1, 5, 30])
)
MANY_RANKS = st.builds(
    Division, st.booleans(), st.integers(1, 48), st.integers(1, 16), st.integers(1, 33), st.sampled_from([0, 9])
)


# ---------------------------------------------------------------- the order again, slow and obviously right


def plan_slowly(index: Index, training: bool, seed: int, epoch: int, history: Sequence[Division]) -> list[dict]:
    """[{(rank, step): samples} of each division], as design.md describes the order. numpy only draws the numbers."""
    sizes, used, plans = [block.samples for block in index.blocks], set(), []
    for number, (seekable, world, workers, batch, shuffle, done) in enumerate(history):
        # The line: the samples of the blocks, permuted, or of the shards, or of none in validation.
        unit = list(range(len(sizes))) if seekable else [block.shard for block in index.blocks]
        places = list(range(max(unit) + 1))
        if training:
            places = np.random.RandomState([seed, epoch]).permutation(len(places)).tolist()
        blocks = sorted(range(len(sizes)), key=lambda block: (places[unit[block]], block))
        line = [sum(sizes[:block]) + n for block in blocks for n in range(sizes[block])]
        line = [sample for sample in line if sample not in used]
        # The ranks' runs: whole batches of consecutive samples; or equal parts that hold all samples.
        if training and len(line) >= world * batch:
            steps = len(line) // (world * batch)
            runs = [line[rank * steps * batch :][: steps * batch] for rank in range(world)]
        else:
            cuts = [-(-rank * len(line) // world) for rank in range(world + 1)]
            runs = [line[begin:end] for begin, end in zip(cuts, cuts[1:])]
            steps = -(-max(map(len, runs)) // batch)
        # The workers' runs: of whole batches, for the steps s with s % workers == worker, each shuffled.
        random_numbers = np.random.RandomState([seed, epoch, number]).random_sample((world, steps * batch))
        plan: dict[tuple[int, int], list[int]] = {}
        for rank, run in enumerate(runs):
            place = 0
            for worker in range(workers):
                turns = range(steps)[worker::workers]
                own = range(place, min(place + len(turns) * batch, len(run)))
                keys = {i: i + shuffle * random_numbers[rank, i] for i in own}
                shuffled = [run[i] for i in sorted(own, key=lambda i: (keys[i], i))]
                for turn, step in enumerate(turns):
                    plan[rank, step] = shuffled[turn * batch : (turn + 1) * batch]
                place += len(turns) * batch
        plans.append(plan)
        used |= {sample for (rank, step), samples in plan.items() if step < done for sample in samples}
    return plans


def as_dict(plan: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """{(rank, step): samples}, of plan_epoch()'s array."""
    return {place: [n for n in plan[place].tolist() if n >= 0] for place in np.ndindex(plan.shape[:2])}


@st.composite
def histories(draw, most: int = 4) -> tuple[Index, list[Division]]:
    """An index, and the divisions of an epoch, each with as many batches done as it can have."""
    index, history = index_of(draw(LAYOUTS)), []
    for division in draw(st.lists(DIVISIONS, min_size=1, max_size=most)):
        history.append(division)
        used = plan_epoch(index, True, 3, 0, history)[1].sum()
        if used == index.total:
            break
        steps = count_steps(int(index.total - used), True, division)
        history[-1] = division._replace(done=draw(st.integers(0, steps)))
    return index, history


# ---------------------------------------------------------------- every plan is the slow one


@settings(max_examples=400, deadline=None)
@given(histories(), st.integers(0, 2**32 - 1), st.integers(0, 90))
def test_training_is_planned_as_described_whatever_was_done_before(case, seed, epoch):
    """Each sample at most once over all divisions; equal steps on all ranks; fewer than ranks x batch are left out."""
    index, history = case
    plan, used = plan_epoch(index, True, seed, epoch, history)
    slow = plan_slowly(index, True, seed, epoch, history)
    assert as_dict(plan) == slow[-1]
    done = [n for division, one in zip(history, slow) for place in one if place[1] < division.done for n in one[place]]
    assert len(done) == len(set(done)) and np.flatnonzero(used).tolist() == sorted(done)
    last, config = history[-1], LoaderConfig(index, True, history[-1].batch, 32)
    assert plan.shape[1] == count_batches(config, history)
    rest = [n for (_, step), batch in slow[-1].items() if step >= last.done for n in batch]
    assert len(done + rest) == len(set(done + rest)) and index.total - len(done + rest) < last.world * last.batch


@settings(max_examples=200, deadline=None)
@given(LAYOUTS, MANY_RANKS, st.integers(0, 3), st.booleans())
@example([[5]], Division(True, 1, 1, 5, 0), 0, True)  # one batch
@example([[1]], Division(False, 48, 16, 33, 0), 0, False)  # ranks without a sample
def test_a_division_is_planned_as_described_for_any_number_of_ranks(layout, division, epoch, training):
    """Validation has every sample once; so has training if it has fewer than a batch of each rank."""
    index = index_of(layout)
    plan, _ = plan_epoch(index, training, 3, epoch, [division])
    assert [as_dict(plan)] == plan_slowly(index, training, 3, epoch, [division])
    used = sorted(plan[plan >= 0].tolist())
    if training and index.total >= division.world * division.batch:
        assert len(used) == len(set(used)) > index.total - division.world * division.batch and (plan >= 0).all()
    else:
        assert used == list(range(index.total))
        assert plan[0, 0, 0] >= 0  # a rank's first batch takes its pixels from a sample, if there is one


# ---------------------------------------------------------------- what one reader does


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(0, 3))
def test_readers_fetch_blocks_in_line_order_and_hold_no_more_than_the_shuffle_and_one_block(case, epoch):
    """And no sample moves by more than `shuffle` within its reader's run of the line."""
    index, history = case
    plan, used = plan_epoch(index, True, 3, epoch, history[:-1] + [history[-1]._replace(done=0)])
    last, fresh = history[-1], history[:-1] + [history[-1]._replace(done=0)]
    line = permute_blocks(index, True, last.seekable, 3, epoch).tolist()
    samples = {block: list(range(index.starts[block], index.starts[block + 1])) for block in line}
    if not last.seekable:  # a command reads a shard from its beginning to its end, and then another one
        shards = [index.blocks[block].shard for block in line]
        assert len(list(itertools.groupby(shards))) == len(set(shards))
        assert all(a < b for a, b in itertools.pairwise(line) if index.blocks[a].shard == index.blocks[b].shard)
    place = {n: i for i, n in enumerate(n for block in line for n in samples[block] if not used[n])}
    for rank, worker in itertools.product(range(last.world), range(last.workers)):
        config = LoaderConfig(index, True, last.batch, 32, seed=3, rank=rank)
        order, blocks, steps = plan_reader(config, epoch, fresh, worker)
        assert [line.index(block) for block in blocks] == sorted({line.index(block) for block in blocks})
        assert set(blocks) == {block for block in line if {*samples[block]} & {*order}}
        run = sorted(order, key=place.get)
        assert [place[n] for n in run] == list(range(place[run[0]], place[run[0]] + len(run))) if run else True
        assert all(abs(i - run.index(n)) <= last.shuffle for i, n in enumerate(order))
        held, fetched, due = set(), iter(blocks), set(order)
        for n in order:
            while n not in held:
                held |= due.intersection(samples[next(fetched)])
            assert len(held) <= last.shuffle + 9  # samples in the largest block
            held.remove(n)
        # A DataLoader takes batches from workers in turn: these are the plan's. Resumed, it begins with any.
        assert steps == len(range(plan.shape[1])[worker :: last.workers])
        assert order == [n for step in plan[rank, worker :: last.workers] for n in step if n >= 0]
        step = last.done + (worker - last.done) % last.workers
        assert plan_reader(config, epoch, history, worker)[0] == [
            n for batch in plan[rank, step :: last.workers] for n in batch if n >= 0
        ]


def test_the_order_does_not_depend_on_the_version_of_numpy():
    """A checkpoint within an epoch is refused if it does."""
    plan, _ = plan_epoch(index_of([[4, 4], [4]]), True, 7, 2, [Division(True, 1, 2, 3, 5)])
    assert plan.tolist() == [[[8, 9, 10], [2, 5, 6], [11, 0, 1], [7, 4, 3]]]


def test_other_samples_are_left_out_each_epoch():
    index, division = index_of([[10]] * 10), [Division(True, 1, 1, 30, 0)]
    left_out = [set(range(100)) - {*plan_epoch(index, True, 0, epoch, division)[0].flat} for epoch in range(20)]
    assert all(len(rest) == 10 for rest in left_out) and len(set.union(*left_out)) > 50


def test_the_shuffle_moves_samples_as_far_as_it_may():
    plan, _ = plan_epoch(index_of([[1000]]), True, 0, 0, [Division(True, 1, 1, 10, 100)])
    moves = [abs(place - n) for place, n in enumerate(plan.flatten().tolist())]
    assert 50 < max(moves) <= 100 and 20 < sum(moves) / 1000 < 50


# ---------------------------------------------------------------- at full scale


@pytest.fixture(scope="module")
def imagenet() -> Index:
    """147 shards of blocks of 64."""
    sizes = [min(8716, 1_281_167 - start) for start in range(0, 1_281_167, 8716)]
    return index_of([[64] * (size // 64) + [size % 64] * (size % 64 > 0) for size in sizes])


@pytest.mark.parametrize("world, batch", [(1, 256), (1024, 32)])
def test_imagenet_on_any_number_of_ranks(imagenet, world, batch):
    division = Division(True, world, 8, batch, 4000)
    plan, _ = plan_epoch(imagenet, True, 0, 3, [division])
    assert plan.shape == (world, 1_281_167 // (world * batch), batch)
    assert np.bincount(plan.flatten(), minlength=1_281_167).max() == 1
    order, blocks, steps = plan_reader(LoaderConfig(imagenet, True, batch, 224, rank=world - 1), 3, [division], 5)
    assert order == plan[-1, 5::8].flatten().tolist() and steps * batch == len(order)
    assert len(blocks) <= len(order) / 64 + 2 + 147  # a block of a shard may be short; the ends of the run are shared


def test_imagenet_is_resumed_with_other_settings_after_half_an_epoch(imagenet):
    history = [Division(True, 8, 8, 256, 2000, done=312), Division(False, 4, 16, 512, 4000)]
    plan, used = plan_epoch(imagenet, True, 0, 3, history)
    assert used.sum() == 312 * 8 * 256 and not used[plan].any() and plan.shape[1] == (1_281_167 - used.sum()) // 2048
    assert np.bincount(plan.flatten()).max() == 1
