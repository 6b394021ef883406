from collections import Counter
from itertools import chain

import numpy as np
import pytest
from torch.utils.data import BatchSampler, Dataset

from datamodules.orders import ByClass, ClassAware, Grouped, Repeated, RepeatFactor, Shuffled
from datamodules.sampling import TrainLoader, TrainSampler


def flat(sets):
    """Lists of labels as the two arrays that orders take."""
    return np.array(list(chain(*sets)), dtype=np.int64), np.cumsum([0, *map(len, sets)])


def orientation(size, seed=0):
    return np.random.default_rng(seed).random(size) < 0.7


def sampler_of(order, batch_size=4, num_replicas=1, rank=0, seed=0):
    return TrainSampler(range(len(order)), batch_size, num_replicas, rank, seed, order=order)


def indices_of(order, global_batch=4, seed=0):
    return order.indices(np.random.default_rng(seed), global_batch)


def images_of(order, size, **options):
    """How often each image comes."""
    return Counter((indices_of(order, **options) % size).tolist())


class Echo(Dataset):
    """The data set is the pairs themselves, so that a batch shows which samples it is."""

    def __getitem__(self, key):
        return key


def loader_of(order, batch_size=4, **options):
    sampler = sampler_of(order, batch_size, **options)
    return TrainLoader(Echo(), batch_size=batch_size, sampler=sampler, drop_last=True, collate_fn=list)


@pytest.mark.parametrize(("size", "global_batch"), [(103, 4), (64, 16), (7, 4), (3, 8), (1, 1)])
def test_a_grouped_epoch_has_each_image_once_and_at_most_one_mixed_batch(size, global_batch):
    groups = orientation(size)
    for seed in range(5):
        order = indices_of(Grouped(Shuffled(size), groups), global_batch, seed)
        assert sorted(order) == list(range(size))
        batches = [groups[order[start : start + global_batch]] for start in range(0, size, global_batch)]
        whole = [batch for batch in batches if len(batch) == global_batch]
        mixed = [batch for batch in whole if 0 < batch.sum() < global_batch]
        assert len(whole) == size // global_batch
        assert len(mixed) <= 1


def test_grouped_batches_come_in_another_order_each_epoch_and_groups_are_interleaved():
    groups = orientation(200)
    epochs = [indices_of(Grouped(Shuffled(200), groups), 4, seed).tolist() for seed in range(2)]
    assert epochs[0] != epochs[1]
    wide = groups[np.array(epochs[0])].reshape(-1, 4).all(1)
    # Batches in no order change the group about 2 * 50 * 0.7 * 0.3 = 21 times; sorted by group they do once.
    assert np.count_nonzero(np.diff(wide.astype(int))) > 10


def test_every_image_misses_a_grouped_epoch_as_rarely_as_the_others():
    # Eight wide images fill two batches exactly. The three others must not be what is left out each time.
    order = Grouped(Shuffled(11), np.arange(11) < 8)
    missed = Counter(int(index) for seed in range(2000) for index in indices_of(order, 4, seed)[8:])
    shares = np.array([missed[index] / 2000 for index in range(11)])
    assert np.abs(shares - 3 / 11).max() < 4 * (3 / 11 * 8 / 11 / 2000) ** 0.5  # 4 standard errors


def orders():
    sets = [[0], [0, 1], [0], [1], [0, 2], [0]] * 9
    labels, starts = flat(sets)
    groups = orientation(len(sets))
    return {
        "grouped": Grouped(Shuffled(len(sets)), groups),
        "repeated": RepeatFactor(threshold=0.5).order(labels, starts),
        "by class": ByClass(labels, starts),
        "grouped by class": Grouped(ByClass(labels, starts), groups),
        "grouped repeated": Grouped(RepeatFactor(threshold=0.5).order(labels, starts), groups),
    }


@pytest.mark.parametrize("name", orders())
@pytest.mark.parametrize("start", [0, 8])
def test_a_global_batch_is_the_same_for_any_number_of_ranks_in_every_order(name, start):
    steps = {}
    for num_replicas in (1, 2, 4):
        per_rank = []
        for rank in range(num_replicas):
            batch_size = 8 // num_replicas
            sampler = sampler_of(orders()[name], batch_size, num_replicas, rank, seed=3)
            sampler.place = (2, start)
            per_rank.append(list(BatchSampler(sampler, batch_size, drop_last=False)))
        steps[num_replicas] = [sorted(chain(*batches)) for batches in zip(*per_rank, strict=True)]
    assert steps[1] == steps[2] == steps[4]
    assert [len(batch) for batch in steps[1]] == [8] * (len(orders()[name]) // 8)


@pytest.mark.parametrize("name", orders())
def test_a_resume_inside_an_epoch_continues_the_order(name):
    whole = [list(batch) for batch in loader_of(orders()[name])]
    loader = loader_of(orders()[name])
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    resumed = loader_of(orders()[name])
    resumed.load_state_dict(loader.state_dict())
    assert [list(batch) for batch in resumed][: len(whole) - 3] == whole[3:]


def test_a_resume_inside_an_epoch_of_another_order_or_grouped_for_another_batch_is_an_error():
    grouped = Grouped(Shuffled(40), orientation(40))
    loader = loader_of(grouped)
    next(iter(loader))
    state = loader.state_dict()
    for other in (
        loader_of(Shuffled(40)),
        loader_of(grouped, batch_size=8),
        loader_of(Grouped(grouped, orientation(40))),
    ):
        with pytest.raises(ValueError, match=r"sample 4 of epoch 0 .*grouped into batches of 4.*this run has"):
            other.load_state_dict(state)
    plain = loader_of(Shuffled(40))
    next(iter(plain))
    with pytest.raises(ValueError, match=r"order \(shuffled\); this run has \(shuffled, grouped into batches of 4\)"):
        loader_of(grouped).load_state_dict(plain.state_dict())
    # The batches of two ranks are those of one, and between epochs nothing is cut.
    loader_of(grouped, batch_size=2, num_replicas=2).load_state_dict(state)
    loader_of(grouped, batch_size=8).load_state_dict({**state, "samples": 0})


def test_repeat_factors_are_those_of_lvis():
    # 100 images: class 0 on all, class 1 on 4, class 2 on 1. With a threshold of 0.16 the factors are 1,
    # sqrt(0.16 / 0.04) = 2 and sqrt(0.16 / 0.01) = 4.
    sets = [[0, 2]] + [[0, 1]] * 4 + [[0]] * 94 + [[]]
    order = RepeatFactor(threshold=0.16).order(*flat(sets))
    count = images_of(order, 100)
    assert [count[index] for index in range(100)] == [4] + [2] * 4 + [1] * 95
    assert len(order) == 4 + 8 + 95
    # A factor of sqrt(0.1 / 0.04) = 1.58 is rounded up.
    assert images_of(RepeatFactor(threshold=0.1).order(*flat(sets)), 100)[1] == 2


def test_classes_come_equally_often_and_their_images_too():
    # Class 0 on 80 images, class 1 on 15, class 3 on 4, class 2 on none; the last image has no object.
    sets = [[0]] * 80 + [[1]] * 15 + [[3]] * 4 + [[]]
    order = ClassAware().order(*flat(sets))
    assert len(order) == 100
    for seed in range(5):
        count = images_of(order, 100, seed=seed)
        images = [[count[index] for index in group] for group in (range(80), range(80, 95), range(95, 99))]
        assert count[99] == 0
        assert max(map(sum, images)) - min(map(sum, images)) <= 1
        assert all(max(counts) - min(counts) <= 1 for counts in images)


@pytest.mark.parametrize("name", ["repeated", "by class", "grouped by class", "grouped repeated"])
def test_an_image_that_comes_again_is_counted_on(name):
    times = {}
    for index in sorted(indices_of(orders()[name]).tolist()):
        times.setdefault(index % 54, []).append(index // 54)
    assert max(map(len, times.values())) > 1
    assert all(numbers == list(range(len(numbers))) for numbers in times.values())


def test_an_image_of_several_classes_serves_each():
    order = ByClass(*flat([[0, 1, 2]]))
    assert indices_of(order).tolist() == [0]
    order = ByClass(*flat([[0, 1], [0]] * 50))
    # Half of the turns are class 1's, which only the even images have; the other half is shared: 75 in the mean. Of
    # the 50 drawn from 100, the even ones have a deviation of 2.5, and their mean over 100 epochs of 0.25: 4 of them.
    even = [np.count_nonzero(indices_of(order, seed=seed) % 2 == 0) for seed in range(100)]
    assert np.mean(even) == pytest.approx(75, abs=1)


def test_data_without_a_label_has_no_classes_to_draw_from():
    assert len(ByClass(*flat([[], []]))) == 0
    assert indices_of(Grouped(ByClass(*flat([[], []])), orientation(2))).tolist() == []
    assert sorted(indices_of(RepeatFactor().order(*flat([[], []])))) == [0, 1]


def test_an_epoch_of_no_samples_does_not_fall_back_to_the_data_set():
    assert len(TrainSampler(range(8), 1, order=Repeated(np.zeros(8, dtype=int), "none"))) == 0


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_an_impossible_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match=rf"threshold={threshold}.*\(0, 1\]"):
        RepeatFactor(threshold=threshold)
