"""The order of an epoch: which samples each reader uses, for every number of ranks, workers, blocks and resumes."""

import itertools
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagenet_train import (
    Block,
    Division,
    Index,
    Line,
    batches_of,
    plan_reader,
    positions_of,
    remaining_steps,
    shuffled,
    steps_of,
    used_samples,
)  # fmt: skip

pytestmark = pytest.mark.quick

LAYOUTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=8)  # shards of blocks


def index_of(layout: list[list[int]]) -> Index:
    """An index of shards whose blocks have these numbers of samples."""
    blocks = [
        Block(shard, place, 1, count, 0) for shard, counts in enumerate(layout) for place, count in enumerate(counts)
    ]
    names = [f"{shard}.tar" for shard in range(len(layout))]
    return Index("", ["n0"], names, [0] * len(names), [""] * len(names), blocks)


def divisions(most: int = 6) -> st.SearchStrategy[Division]:
    return st.builds(
        Division,
        st.booleans(),
        st.integers(1, most),
        st.integers(1, 5),
        st.integers(1, 7),
        st.sampled_from([0, 1, 5, 30]),
        st.just(0),
    )


def everyone(index: Index, training: bool, epoch: int, history: list[Division]) -> dict[tuple[int, int], list[int]]:
    """(rank, worker) → its samples in the order of use."""
    _, world, workers, *_ = history[-1]
    readers = itertools.product(range(world), range(workers))
    return {reader: plan_reader(index, training, 3, epoch, history, *reader)[0] for reader in readers}


def delivered(plans: dict[tuple[int, int], list[int]], division: Division, rank: int, steps: int) -> list[list[int]]:
    """A rank's batches in the order in which the DataLoader takes them from workers in turn."""
    left = {worker: iter(plans[rank, worker]) for worker in range(division.workers)}
    turns = [n % division.workers for n in range(division.done, steps)]
    return [list(itertools.islice(left[worker], division.batch)) for worker in turns]


# ---------------------------------------------------------------- one division


@settings(max_examples=300, deadline=None)
@given(LAYOUTS, st.booleans(), st.integers(0, 5), divisions(48))
@example([[5]], True, 0, Division(True, 1, 1, 5, 0))  # one batch
@example([[1]], False, 0, Division(False, 48, 16, 33, 0))  # ranks without a sample
def test_every_sample_is_used_by_one_reader(layout, training, epoch, division):
    index = index_of(layout)
    _, world, workers, batch, *_ = division
    steps = steps_of(index.total, training, world, batch)
    plans = everyone(index, training, epoch, [division])
    used = sorted(itertools.chain(*plans.values()))
    assert len(used) == len(set(used))
    if training and index.total >= world * batch:
        assert index.total - len(used) < world * batch
        for (_, worker), order in plans.items():
            assert len(order) == len(batches_of(steps, worker, workers)) * batch  # only full batches
    else:
        assert used == list(range(index.total))
        assert plans[0, 0]  # rank 0 has a sample if there is one
        for (_, worker), order in plans.items():
            assert len(order) <= len(batches_of(steps, worker, workers)) * batch


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 2_000_000), st.booleans(), st.integers(1, 1024), st.integers(0, 16), st.integers(1, 512), st.data()
)
def test_readers_adjoin_on_the_line_at_any_scale(left, training, world, workers, batch, data):
    """A rank owns one run of the line, its workers runs of that, each of whole batches; ranks make equal steps."""
    division, rank = Division(True, world, max(1, workers), batch, 0), data.draw(st.integers(0, world - 1))
    steps = steps_of(left, training, world, batch)
    full = training and left >= world * batch
    begin = rank * steps * batch if full else -(-rank * left // world)
    end = (rank + 1) * steps * batch if full else -(-(rank + 1) * left // world)
    for worker in range(division.workers):
        positions = positions_of(left, training, division, rank, worker)
        assert positions.start == begin and len(positions) <= len(batches_of(steps, worker, division.workers)) * batch
        begin = positions.stop
    assert begin == end <= left


@given(st.integers(0, 500), st.integers(1, 17))
def test_workers_take_turns(steps, workers):
    """Asked in turn, workers run dry in turn: the DataLoader never gets a batch from the wrong one."""
    runs = [batches_of(steps, worker, workers) for worker in range(workers)]
    assert [n for run in runs for n in run] == list(range(steps))
    lengths = [len(run) for run in runs]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


@settings(deadline=None)
@given(LAYOUTS, divisions(), st.integers(0, 3))
def test_the_line_permutes_blocks_or_shards(layout, division, epoch):
    """Blocks where any can be read; for a command shards, each read from its beginning to its end."""
    index = index_of(layout)
    line = Line(index, True, division.seekable, 3, epoch, bytearray(index.total))
    units = list(range(len(index.blocks) if division.seekable else len(layout)))
    random.Random(f"3/{epoch}").shuffle(units)
    expected = (
        units if division.seekable else [n for s in units for n, block in enumerate(index.blocks) if block.shard == s]
    )
    assert line.blocks == expected
    samples = {block: list(range(index.starts[block], index.starts[block + 1])) for block in expected}
    assert list(line.samples(range(len(line))).items()) == list(samples.items())
    validation = Line(index, False, division.seekable, 3, epoch, bytearray(index.total))
    assert list(itertools.chain(*validation.samples(range(len(validation))).values())) == list(range(index.total))


@settings(deadline=None)
@given(LAYOUTS, divisions(), st.integers(0, 3))
def test_blocks_are_fetched_in_the_lines_order_and_before_their_samples(layout, division, epoch):
    index = index_of(layout)
    line = Line(index, True, division.seekable, 3, epoch, bytearray(index.total)).blocks
    for rank, worker in itertools.product(range(division.world), range(division.workers)):
        order, blocks = plan_reader(index, True, 3, epoch, [division], rank, worker)
        places = [line.index(block) for block in blocks]
        assert places == sorted(places) and len(set(blocks)) == len(blocks)
        assert {b for b in blocks} == {
            next(b for b in line if index.starts[b] <= n < index.starts[b + 1]) for n in order
        }
        held, most, fetched = set(), 0, iter(blocks)
        for number in order:
            while number not in held:
                block = next(fetched)
                held |= set(range(index.starts[block], index.starts[block + 1])) & set(order)
            most = max(most, len(held))
            held.remove(number)
        assert most <= division.shuffle + 2 + 9  # the buffer, which takes two at a time, and one block


def test_the_order_is_the_seeds_and_the_epochs():
    index = index_of([[7, 8, 9], [10, 11]] * 4)
    division = Division(True, 1, 1, 4, 5)
    orders = {(s, e): tuple(plan_reader(index, True, s, e, [division], 0, 0)[0]) for s in (0, 1) for e in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert orders[0, 1] == tuple(plan_reader(index, True, 0, 1, [division], 0, 0)[0])
    validation = [division._replace(shuffle=0)]
    assert plan_reader(index, False, 0, 0, validation, 0, 0) == plan_reader(index, False, 1, 9, validation, 0, 0)


def test_other_samples_are_left_out_each_epoch():
    index = index_of([[10]] * 10)
    division = Division(True, 1, 1, 30, 0)
    left_out = [set(range(100)) - set(plan_reader(index, True, 0, e, [division], 0, 0)[0]) for e in range(20)]
    assert all(len(rest) == 10 for rest in left_out) and len(set.union(*left_out)) > 50


def test_the_shuffle_is_webdatasets():
    numbers = list(range(100))
    order = shuffled({0: numbers}, Division(True, 1, 1, 4, 20), 0, 1, 2, 3)
    assert sorted(order) == numbers != order
    assert all(number <= place + 20 + 1 for place, number in enumerate(order))  # no later sample than the buffer holds
    assert shuffled({0: numbers}, Division(True, 1, 1, 4, 0), 0, 1, 2, 3) == numbers


# ---------------------------------------------------------------- several divisions


@settings(max_examples=300, deadline=None)
@given(LAYOUTS, st.lists(divisions(), min_size=1, max_size=5), st.integers(0, 3), st.data())
def test_a_run_that_is_resumed_with_other_settings_uses_no_sample_twice(layout, settings_list, epoch, data):
    """Up to four changes within an epoch: equal steps on all ranks; fewer than ranks x batch are left out."""
    index = index_of(layout)
    history, used = [], []
    for division in settings_list:
        history.append(division)
        steps = remaining_steps(index, True, history)
        left = index.total - len(used)
        if left == 0:
            break
        plans = everyone(index, True, epoch, history)
        if division is settings_list[-1]:
            done = steps
        else:
            done = data.draw(st.integers(0, max(0, left // (division.world * division.batch) - 1)))
        batches = [delivered(plans, division, rank, steps) for rank in range(division.world)]
        assert {len(rank) for rank in batches} == {steps}
        new = [n for rank in batches for batch in rank[:done] for n in batch]
        history[-1] = division._replace(done=done)
        # The same run, resumed with the same settings after `done` batches, makes the batches that follow.
        for rank, rest in enumerate(
            delivered(everyone(index, True, epoch, history), history[-1], r, steps) for r in range(division.world)
        ):
            assert rest == batches[rank][done:]
        used += new
        marks = used_samples(index, 3, epoch, history)
        assert sorted(used) == [n for n, mark in enumerate(marks) if mark]
    assert len(used) == len(set(used))
    assert index.total - len(used) < division.world * division.batch


def test_a_rest_that_is_shorter_than_a_batch_makes_one_step():
    index = index_of([[4, 4], [2]])
    history = [Division(True, 1, 1, 4, 0, done=1), Division(True, 3, 2, 4, 0)]
    assert remaining_steps(index, True, history) == 1
    plans = everyone(index, True, 0, history)
    assert [len(plans[rank, 0]) for rank in range(3)] == [2, 2, 2] and not any(plans[rank, 1] for rank in range(3))
    assert used_samples(index, 3, 0, [*history[:1], history[1]._replace(done=1)]).count(1) == 10


# ---------------------------------------------------------------- at full scale


@pytest.fixture(scope="module")
def imagenet() -> Index:
    """147 shards of blocks of 64."""
    count = 1_281_167
    shards = [min(8716, count - start) for start in range(0, count, 8716)]
    return index_of([[64] * (size // 64) + ([size % 64] if size % 64 else []) for size in shards])


def test_imagenet_on_1024_ranks_of_8_workers(imagenet):
    division = Division(True, 1024, 8, 32, 0)
    used = [
        n
        for rank in range(0, 1024, 97)
        for worker in range(8)
        for n in plan_reader(imagenet, True, 0, 3, [division], rank, worker)[0]
    ]
    assert len(used) == len(set(used)) == 11 * (1_281_167 // (1024 * 32)) * 32


def test_imagenet_is_resumed_with_other_settings_after_half_an_epoch(imagenet):
    old = Division(True, 8, 8, 256, 2000, done=312)
    order, blocks = plan_reader(imagenet, True, 0, 3, [old, Division(True, 4, 16, 512, 4000)], 3, 5)
    used = used_samples(imagenet, 0, 3, [old])
    assert used.count(1) == 312 * 8 * 256 and not any(used[n] for n in order)
    assert len(order) == len(batches_of((1_281_167 - 312 * 2048) // 2048, 5, 16)) * 512
