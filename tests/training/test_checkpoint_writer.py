"""Which states of a run are kept."""

from pathlib import Path
from types import SimpleNamespace

from src.training.checkpoint_writer import Checkpoints


class Saved:
    """A trainer that writes down the step at which it is asked to save."""

    should_stop, is_global_zero, callbacks = False, True, ()

    def __init__(self) -> None:
        self.step = 0
        self.steps: list[int] = []

    def save_checkpoint(self, path: Path) -> None:
        self.steps.append(self.step)
        path.write_text(f"state of step {self.step}")


def run(folder: Path, *, every: int | None, losses: dict[int, tuple[float, float]]) -> Saved:
    """Twelve steps, with the share of non-finite windows and the loss of those that validate."""
    validation, trainer = SimpleNamespace(last_step=0, last={}), Saved()
    kept = Checkpoints(
        folder / "last.ckpt",
        validation=validation,
        every=every,
        keep={},
        keys=lambda step: "",
        flush=lambda: 0,
    )
    for trainer.step in range(1, 13):
        if trainer.step in losses:
            frac, loss = losses[trainer.step]
            validation.last_step = trainer.step
            validation.last = {"val/nonfinite_frac": frac, "val/loss": loss}
        kept.on_step_end(trainer, None, trainer.step)
    return trainer


def test_the_last_state_is_saved_at_its_interval_and_after_each_validation(tmp_path):
    assert run(tmp_path, every=5, losses={4: (0.0, 1.0)}).steps == [4, 5, 10]
    assert run(tmp_path, every=None, losses={4: (0.0, 1.0), 12: (0.0, 2.0)}).steps == [4, 12]
    assert (tmp_path / "last.ckpt").read_text() == "state of step 12"


def test_the_best_three_are_kept_and_a_window_without_a_loss_counts_before_the_loss(tmp_path):
    losses = {2: (0.0, 3.0), 4: (0.0, 2.0), 6: (0.0, 5.0), 8: (0.5, 1.0), 10: (0.0, 4.0)}
    run(tmp_path, every=None, losses=losses)
    best = {file.name: file.read_text() for file in tmp_path.glob("step-*.ckpt")}
    assert best == {f"step-{step}.ckpt": f"state of step {step}" for step in (2, 4, 10)}
