"""The guard in somebody else's loop over two real processes."""

import subprocess
import sys
import textwrap

import pytest
import torch

from tests.runs import ROOT

SCRIPT = textwrap.dedent(
    """
    import sys
    import torch, torch.multiprocessing as mp
    import lightning.pytorch as pl
    from src.data.batches import TrainBatches
    from nonfinite.lightning.guard import StepGuard
    from src.training.task import LanguageModelTask
    from tests.builders import transformer
    from tests.training.harness import TEXT, guard_config, recipe_config

    class PoisonOneRank(pl.Callback):
        def on_before_backward(self, trainer, task, loss):
            if trainer.global_step == 2 and trainer.global_rank == 1:
                loss.data.fill_(float("nan"))  # the loss alone: gradients stay finite

    def main(out):
        recipe = recipe_config(batch_size=4, max_steps=4)
        guard = StepGuard(guard_config(), max_steps=4, log_every=1)
        task = LanguageModelTask(
            model=transformer(max_seq_len=8), recipe=recipe, guard=guard,
            lr_factor=recipe.lr_factor, checkpoint_extras={},
        )
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, max_epochs=-1, max_steps=4,
            strategy="ddp_fork",
            callbacks=[PoisonOneRank(), guard], logger=False, limit_val_batches=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )

        class Save(pl.Callback):
            def on_train_end(self, trainer, task):
                torch.save(
                    {"weights": task.state_dict(), "guard": guard.summary()},
                    f"{out}-{trainer.global_rank}",
                )

        class Rows:
            def __iter__(self):
                return iter(TrainBatches(
                    TEXT, seed=0, batch_size=recipe.batch_size, seq_len=8,
                    rank=trainer.global_rank, world_size=trainer.world_size,
                ))

        trainer.callbacks.append(Save())
        trainer.fit(task, train_dataloaders=Rows())

    if __name__ == "__main__":
        torch.set_num_threads(1)
        main(sys.argv[1])
    """
)


@pytest.mark.slow
def test_a_loss_that_is_nan_on_one_rank_skips_the_step_on_both(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(f"{out}-{rank}", weights_only=True) for rank in range(2)]
    for rank in ranks:
        assert rank["guard"]["skipped_steps"] == 1
        assert rank["guard"]["first_nonfinite_step"] == 3
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name
