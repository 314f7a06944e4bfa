"""The loop: the same bits after a kill, however batches are cut, and words when it goes wrong."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rarefy.core.errors import DataError, RecipeError, TrainingError
from rarefy.training.examples import Rows
from rarefy.training.loop import FILE, Batch, Loss, Settings, Task, fit, held_out, order

SETTINGS = Settings(epochs=3, batch=8, rate=1e-2, save_every=3, precision="float32")
RUN = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_loop import Regression, SETTINGS, rows
from rarefy.training.loop import fit, held_out
task = Regression()
def advance(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
gate = held_out(task, rows(1), SETTINGS)
curve = fit(task, rows(), SETTINGS, gate=gate, folder=Path(sys.argv[2]), advance=advance)
torch.save((dict(task.state_dict()), [p.loss for p in curve.points], curve.best), Path(sys.argv[2]) / "done")
"""


class Regression(Task):
    """Two layers with dropout in between, and a count that lasts."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch) -> Loss:
        error = (self.body(batch["x"])[:, 0] - batch["y"]).square()
        return Loss(error.sum(), torch.tensor(float(len(error))))

    def update(self, step: int, total: int) -> None:
        self.steps += 1


def rows(seed: int = 0, count: int = 64) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return Rows({"x": x, "y": x.square().sum(1).sqrt()})


def trained(settings: Settings, task: Task | None = None, **more: object) -> tuple[Task, list[float]]:
    task = Regression() if task is None else task
    curve = fit(task, rows(), settings, **more)  # type: ignore[arg-type]
    return task, [point.loss for point in curve.points]


def test_it_learns_and_keeps_the_best(tmp_path: Path) -> None:
    task = Regression()
    gate = held_out(task, rows(1), SETTINGS)
    task.eval()
    with torch.no_grad():
        before = gate()
    curve = fit(task, rows(), SETTINGS, gate=gate)
    judged = [point.gate for point in curve.points if point.gate is not None]
    assert curve.best == min(judged) < before
    with torch.no_grad():
        assert gate() == pytest.approx(curve.best, rel=1e-5)
    assert [point.step for point in curve.points] == list(range(1, 25))
    assert not task.training


@pytest.mark.parametrize("kill", [4, pytest.param(17, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_bits(kill: int, tmp_path: Path) -> None:
    def run(folder: Path, at: int) -> int:
        return subprocess.run([sys.executable, "-c", RUN, str(Path(__file__).parent), str(folder), str(at)],
                              timeout=120, check=False).returncode

    if not (whole := tmp_path.parent / "whole" / "done").exists():
        assert run(whole.parent, -1) == 0
    broken = tmp_path / "broken"
    assert run(broken, kill) == -signal.SIGKILL
    assert run(broken, -1) == 0
    expected, found = torch.load(whole), torch.load(broken / "done")
    assert expected[1:] == found[1:]
    assert all(torch.equal(value, found[0][name]) for name, value in expected[0].items())


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, losses = trained(SETTINGS, folder=tmp_path)
    again, same = trained(SETTINGS, folder=tmp_path)
    assert losses == same
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(),
                                                 strict=True))


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    trained(SETTINGS, folder=tmp_path)
    with pytest.raises(RecipeError, match=r"rate was 0\.01, is 0\.02"):
        trained(Settings(**{**SETTINGS.__dict__, "rate": 0.02}), folder=tmp_path)
    with pytest.raises(RecipeError, match="data was"):
        fit(Regression(), rows(5), SETTINGS, folder=tmp_path)
    changed = Regression()
    changed.body[0].weight.data += 1
    with pytest.raises(RecipeError, match="start was"):
        trained(SETTINGS, changed, folder=tmp_path)


def test_micro_batches_and_uneven_units_give_the_same_step() -> None:
    class Uneven(Regression):
        """Examples of different weight, as texts of different length are."""

        def forward(self, batch: Batch) -> Loss:
            error = (self.body(batch["x"])[:, 0] - batch["y"]).square()
            units = (batch["x"][:, 0] > 0).float() * 3 + 1
            return Loss((error * units).sum(), units.sum())

    def run(micro: int) -> list[float]:
        task = Uneven()
        task.body[2].p = 0.0
        return trained(Settings(steps=6, batch=8, micro=micro, precision="float32"), task)[1]

    torch.testing.assert_close(run(0), run(3), rtol=1e-5, atol=1e-6)


def test_equals_a_bare_loop() -> None:
    """AdamW on the mean loss, clipped: what everybody writes."""
    settings = Settings(steps=10, batch=8, rate=1e-2, schedule="linear", precision="float32", decay=0.1)
    task = Regression()
    task.body[2].p = 0.0
    bare, data = copy.deepcopy(task), rows()
    trained(settings, task)
    matrices = [value for value in bare.parameters() if value.ndim > 1]
    vectors = [value for value in bare.parameters() if value.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98))
    numbers = torch.cat([order(data, 8, 0, epoch) for epoch in range(2)])
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 / 2 if step < 1 else 1 - (step - 1) / 9)
        batch = data.batch(numbers[step])
        optimizer.zero_grad()
        (bare.body(batch["x"])[:, 0] - batch["y"]).square().mean().backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(dict(task.body.named_parameters()), dict(bare.body.named_parameters()))


def test_a_loss_that_is_no_number_keeps_the_last_good_state(tmp_path: Path) -> None:
    class Breaking(Regression):
        def forward(self, batch: Batch) -> Loss:
            loss = super().forward(batch)
            return Loss(loss.total / (0 if self.training and int(self.steps) == 5 else 1), loss.units)

    task = Breaking()
    with pytest.raises(TrainingError, match=r"step 6: the loss is inf, first in the gradient of body\.0"):
        fit(task, rows(), SETTINGS, folder=tmp_path)
    assert all(bool(torch.isfinite(value).all()) for value in task.parameters())
    held = torch.load(tmp_path / FILE, weights_only=True)
    assert held["step"] == 5


def test_patience_stops_early() -> None:
    task = Regression()
    judged = iter([3.0, 2.0, 2.5, 2.5, 2.5, 2.5])
    curve = fit(task, rows(), Settings(steps=60, gate_every=5, patience=2), gate=lambda: next(judged))
    assert (curve.best, curve.best_step, curve.points[-1].step) == (2.0, 10, 20)
    assert "no gain in 2" in curve.stopped


def test_noise_of_others_is_left_alone() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    task = Regression()
    torch.set_rng_state(states[0])
    trained(Settings(steps=2), task)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]


def test_nothing_to_train_is_refused() -> None:
    task = Regression().requires_grad_(False)
    with pytest.raises(RecipeError, match="every parameter is frozen"):
        trained(SETTINGS, task)
    with pytest.raises(DataError, match="no examples"):
        fit(Regression(), Rows({"x": torch.empty(0, 6)}), SETTINGS)
    for wrong in ({"rate": 0.0}, {"warmup": 1.0}, {"schedule": "step"}, {"batch": 0}, {"rate": float("nan")}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            Settings(**wrong)  # type: ignore[arg-type]


def test_order_is_whole_and_groups_lengths() -> None:
    ends = torch.randint(1, 40, (512, 1), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < ends).long()
    data = Rows({"input_ids": mask.clone(), "attention_mask": mask})
    numbers = order(data, 16, 0, 0)
    assert sorted(numbers.flatten().tolist()) == list(range(512))
    assert not torch.equal(numbers, order(data, 16, 0, 1)) and torch.equal(numbers, order(data, 16, 0, 0))
    lengths = mask.sum(1)[numbers]
    assert float((lengths.amax(1) - lengths.amin(1)).float().mean()) < 5
    assert data.batch(numbers[0])["input_ids"].shape[1] == int(lengths[0].max())


def test_parameters_in_pieces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator, DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(RecipeError, match=r"FSDP: shards parameters.*launch with torchrun alone"):
        trained(SETTINGS)


TWO = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_loop import Regression, rows
from rarefy.training.loop import Settings, fit
task = Regression(); task.body[2].p = 0.0
curve = fit(task, rows(), Settings(steps=6, batch=8, micro=2, precision="float32", save_every=2),
            folder=Path(sys.argv[2]) / "run")
import os
torch.save([p.loss for p in curve.points], Path(sys.argv[2]) / f"rank{os.environ.get('RANK', 'only')}")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    for folder, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone",
                                                 "--nproc-per-node", "2"])):
        (tmp_path / folder).mkdir()
        done = subprocess.run([sys.executable, *launch, str(script), str(Path(__file__).parent),
                               str(tmp_path / folder)], capture_output=True, text=True, timeout=180,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "one" / "rankonly")
    for rank in ("rank0", "rank1"):
        torch.testing.assert_close(torch.load(tmp_path / "two" / rank), one, rtol=1e-4, atol=1e-5)
