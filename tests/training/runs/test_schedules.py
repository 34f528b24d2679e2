"""The paper's schedule: warm up, then times 0.4 whenever the validation loss has not improved."""

import pytest
import torch

from poly_encoders.training.runs.schedules import WarmupReduceLROnPlateau


def scheduled(warmup=4, **options):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr": 1.0}, {"params": [parameters[1]], "lr": 30.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return optimizer, WarmupReduceLROnPlateau(optimizer, warmup, **{"factor": 0.4, "patience": 0, **options})


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_warm_up_then_plateau():
    optimizer, schedule = scheduled()
    seen = []
    for step in range(6):
        schedule.warm_up(step)
        seen.append(rates(optimizer)[0])
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(optimizer) == [1.0, 30.0]
    schedule.step(2.0)
    schedule.step(1.9)
    assert rates(optimizer) == [1.0, 30.0]
    schedule.step(1.95)
    assert rates(optimizer) == pytest.approx([0.4, 12.0])
    schedule.step(1.9)  # as good as the best is no improvement
    assert rates(optimizer) == pytest.approx([0.16, 4.8])
    schedule.step(1.5)
    assert rates(optimizer) == pytest.approx([0.16, 4.8])


def test_nothing_is_lowered_while_it_warms_up():
    optimizer, schedule = scheduled(warmup=0)  # not at all
    schedule.warm_up(0)
    assert rates(optimizer) == [1.0, 30.0]
    optimizer, schedule = scheduled(warmup=10)
    schedule.warm_up(0)
    for value in (2.0, 3.0, 4.0):
        schedule.step(value)
    for step in range(1, 10):
        schedule.warm_up(step)
    assert rates(optimizer) == [1.0, 30.0]
    schedule.step(2.5)  # the first after the warm-up, worse than the best within it
    assert rates(optimizer) == pytest.approx([0.4, 12.0])


def test_state_goes_on():
    """Through torch.load with weights only, as transformers does."""
    optimizer, schedule = scheduled()
    for step in range(5):
        schedule.warm_up(step)
    schedule.step(1.0)
    schedule.step(2.0)
    other_optimizer, other = scheduled()
    other.load_state_dict(schedule.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    for each in (schedule, other):
        each.warm_up(5)
        each.step(3.0)
    assert rates(optimizer) == rates(other_optimizer) == pytest.approx([0.16, 4.8])
