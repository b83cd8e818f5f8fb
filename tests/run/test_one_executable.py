"""A run compiles one training step, whatever the lengths of its examples, its methods and its learning rates."""

import jax

from mlora_jax.config import resolve
from mlora_jax.run.experiment import Experiment
from mlora_jax.run.starts import first_state, loop_phases
from mlora_jax.trials import expand_trials


def test_gsm8k_compiles_one_step(shared, tmp_path):
    """Eight steps of real questions of other lengths each; DyLoRA and LoRA at two rates, one after the other."""
    config = resolve(
        {
            "model": {"path": str(shared / "models/stories-260k")},
            "data": {
                "task": "gsm8k",
                "raw_dir": str(shared / "data"),
                "cache_dir": str(tmp_path),
                "limit": 64,
                "max_length": 512,
                "overflow": "drop",
            },
            "train": {"batch_size": 6, "accumulation": 2, "epochs": 1, "row_widths": (512, 320)},
            "trials": {"method": ("lora", "dylora"), "learning_rate": (1e-3, 1e-4), "seed": (42,), "rank": (4,)},
        }
    )
    experiment = Experiment.load(config)
    lengths, passes = set(), set()
    for trial in expand_trials(config):
        state, keys = first_state(experiment, [trial])
        phase = loop_phases(experiment, [trial], keys)[0]
        for step, batch in zip(range(8), experiment.batches([trial]), strict=False):
            state, metrics = phase.step(state, batch, phase.draw(step), phase.schedule)
            lengths.add(float(batch["real_tokens"]))
            passes.add(tuple(batch["passes"].tolist()))
        assert jax.device_get(metrics["finite"]).all()
    assert len(lengths) == 8 and len(passes) > 1
    assert experiment.compilations["train"] == 1
