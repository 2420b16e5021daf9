import time

import pytest
import torch

from pmm.training.failures import LossWatch
from pmm.training.progress import Meter, data_loading_hint, epoch_line, mean_of_records

CPU = torch.device("cpu")


def losses(total):
    return {
        "triplet1": torch.tensor(total / 4),
        "cross_entropy1": torch.tensor(0.75 * total),
        "loss": torch.tensor(total),
    }


def test_an_epoch_in_two_parts_is_the_epoch_in_one():
    whole, first = Meter(CPU), Meter(CPU)
    for total in (4.0, 2.0):
        whole.step(losses(total), 8, 0.5)
        first.step(losses(total), 8, 0.5)
    time.sleep(0.05)
    second = Meter(CPU, first.state())
    for meter in (whole, second):
        meter.step(losses(1.0), 4, 0.25)
    found, expected = second.record(), whole.record()
    for name in ("triplet1", "cross_entropy1", "loss", "lr"):
        assert found[name] == expected[name]
    assert (second.steps, second.images) == (3, 20)
    assert found["loss"] == pytest.approx(7 / 3)
    assert found["seconds"] >= 0.05
    assert found["images_per_s"] == pytest.approx(20 / found["seconds"], rel=0.05)
    assert 0.05 < found["memory_gb"] < 64


def test_waiting_is_told_from_working():
    meter = Meter(CPU)

    def slow():
        for _ in range(3):
            time.sleep(0.03)
            yield "batch"

    for _ in meter.batches(slow(), "epoch", 3):
        time.sleep(0.01)
        meter.step(losses(1.0), 1, 1.0)
    record = meter.record()
    assert 0.09 <= record["data_seconds"] < record["seconds"]
    assert record["step_seconds"] >= 0.03
    assert record["data_seconds"] + record["step_seconds"] == pytest.approx(record["seconds"])


def test_several_processes_make_one_record():
    one = {"epoch": 1, "loss": 2.0, "images_per_s": 10.0, "memory_gb": 1.0, "seconds": 4.0}
    other = {"epoch": 1, "loss": 4.0, "images_per_s": 20.0, "memory_gb": 3.0, "seconds": 4.0}
    merged = mean_of_records([one, other])
    assert merged == {"epoch": 1, "loss": 3.0, "images_per_s": 30.0, "memory_gb": 3.0, "seconds": 4.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_kept_with_its_batch(value):
    watch = LossWatch(CPU)
    assert watch.not_finite() is None
    watch.watch(losses(1.0), "good", 1)
    assert watch.not_finite() is None
    watch.watch(losses(value), "bad", 2)
    found, batch, step = watch.not_finite()
    assert (batch, step) == ("bad", 2)
    assert not torch.tensor(found["loss"]).isfinite()


def test_the_line_of_an_epoch():
    record = {
        "loss": 7.5, "triplet1": 0.5, "cross_entropy1": 3.0, "triplet2": 0.75, "cross_entropy2": 3.25, "lr": 0.001,
        "images_per_s": 480.2, "memory_gb": 1.26, "val_mAP": 0.5, "val_rank1": 0.75,
        "data_seconds": 0.1, "step_seconds": 0.9,
    }  # fmt: skip
    assert epoch_line("epoch 2/9", record, 10, 4000) == (
        "epoch 2/9  loss 7.500 (3.50 + 4.00)  lr 1.0e-03  480 images/s  1.3 GB  val mAP 0.500 rank-1 0.750  "
        "data 10 ms  step 90 ms  1:06:40 left"
    )
    assert epoch_line("epoch 2/9", record, 10, 61).endswith("  1:01 left")
    one = {name: value for name, value in record.items() if not name.endswith("2")}
    assert "loss 7.500  lr" in epoch_line("epoch 2/9", one, 10, 61)
    alone = {name: value for name, value in record.items() if not name.startswith("triplet")} | {"loss": 6.25}
    assert "loss 6.250 (3.00 + 3.25)  lr" in epoch_line("epoch 2/9", alone, 10, 61)
    penalised = alone | {"loss": 7.0, "overlap": 0.75}
    assert "loss 7.000 (3.00 + 3.25 + penalty 0.75)  lr" in epoch_line("epoch 2/9", penalised, 10, 61)


def test_waiting_for_data_is_noticed():
    def advice(waited, workers, cores):
        return data_loading_hint({"data_seconds": waited, "step_seconds": 9 - waited, "seconds": 9.0}, workers, cores)

    assert advice(3.0, 1, 8) == ""
    slow = advice(4.5, 1, 8)
    assert slow.startswith("50% ")
    assert "use --workers 8" in slow
    busy = advice(4.5, 8, 8)
    assert "--workers 8 keeps all 8 cores busy" in busy
    assert "\n" not in slow + busy
