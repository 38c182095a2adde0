"""The plan of who reads what: exact for every number of ranks, workers and samples."""

import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagenet_train import batches_of, pieces_of, steps_per_epoch

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(sum)


def positions(counts, training, seed, epoch, rank, world, worker, workers, batch) -> list[tuple[int, int]]:
    """(shard, place in it) of each sample that a reader reads."""
    pieces = pieces_of(counts, training, seed, epoch, rank, world, worker, workers, batch)
    for piece in pieces:
        assert 0 <= piece.start < piece.stop <= counts[piece.shard]
    return [(piece.shard, i) for piece in pieces for i in range(piece.start, piece.stop)]


@settings(max_examples=300, deadline=None)
@given(COUNTS, st.booleans(), st.integers(0, 5), st.integers(0, 5), st.integers(1, 48), st.integers(0, 16), st.integers(1, 33))
@example([5], True, 0, 0, 1, 0, 5)  # one batch
@example([1], False, 0, 0, 48, 16, 33)  # ranks without a sample
def test_every_sample_is_read_by_one_reader(counts, training, seed, epoch, world, workers, batch):
    total, workers = sum(counts), max(1, workers)
    steps = steps_per_epoch(total, training, world, batch)
    everyone = []
    for rank in range(world):
        made = 0
        for worker in range(workers):
            found = positions(counts, training, seed, epoch, rank, world, worker, workers, batch)
            run = batches_of(steps, worker, workers)
            assert len(found) == len(run) * batch if training else len(found) <= len(run) * batch
            made += len(run)
            everyone += found
        assert made == steps  # the same for every rank
    assert len(set(everyone)) == len(everyone)
    assert 0 <= total - len(everyone) < world * batch if training else len(everyone) == total


def line_of(counts, training, seed, epoch) -> dict[int, int]:
    """Shard → where its samples begin on the epoch's line, said a second time and more plainly than in the script."""
    order = list(range(len(counts)))
    if training:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return {shard: sum(counts[s] for s in order[:place]) for place, shard in enumerate(order)}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**4), min_size=1, max_size=150).filter(sum), st.booleans(), st.integers(1, 1024),
       st.integers(0, 16), st.integers(1, 512), st.data())
def test_a_rank_owns_its_run_of_the_line(counts, training, world, workers, batch, data):
    """At any scale the pieces of a rank's workers adjoin, and make up exactly the run that the design gives it."""
    total, workers, rank = sum(counts), max(1, workers), data.draw(st.integers(0, world - 1))
    steps = steps_per_epoch(total, training, world, batch)
    run = [rank * steps * batch, (rank + 1) * steps * batch]
    if not training:
        run = [rank * total // world, (rank + 1) * total // world]
    begin, place = line_of(counts, training, 3, 1), run[0]
    for worker in range(workers):
        for piece in pieces_of(counts, training, 3, 1, rank, world, worker, workers, batch):
            assert begin[piece.shard] + piece.start == place
            place += piece.stop - piece.start
    assert place == run[1]


@given(st.integers(0, 500), st.integers(1, 17))
def test_workers_take_turns(steps, workers):
    """Asked in turn, workers run dry in turn: the loader never gets a batch from the wrong one."""
    runs = [batches_of(steps, worker, workers) for worker in range(workers)]
    assert [n for run in runs for n in run] == list(range(steps))
    lengths = [len(run) for run in runs]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


def test_the_epochs_order_is_the_seeds():
    counts = [7, 8, 9, 10, 11] * 4
    orders = {(s, e): tuple(pieces_of(counts, True, s, e, 0, 1, 0, 1, 4)) for s in (0, 1) for e in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert orders[0, 1] == tuple(pieces_of(counts, True, 0, 1, 0, 1, 0, 1, 4))
    assert pieces_of(counts, False, 0, 0, 0, 1, 0, 1, 4) == pieces_of(counts, False, 1, 9, 0, 1, 0, 1, 4)


def test_the_rest_of_an_epoch_changes():
    counts = [10] * 10
    rests = [set(range(10)) - {p.shard for p in pieces_of(counts, True, 0, e, 0, 1, 0, 1, 30)} for e in range(20)]
    assert all(len(rest) == 1 for rest in rests) and len(set.union(*rests)) > 5


def test_imagenet_on_1024_ranks_of_8_workers():
    counts = [8715] * 146 + [1281167 - 146 * 8715]
    read = sum(p.stop - p.start for rank in range(1024) for worker in range(8)
               for p in pieces_of(counts, True, 0, 3, rank, 1024, worker, 8, 32))
    assert read == 1281167 // (1024 * 32) * 1024 * 32
