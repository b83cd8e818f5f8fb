"""What a run says about its experiment before it trains."""

from __future__ import annotations

import jax

from mlora_jax.parallel import hosts
from mlora_jax.run.experiment import Experiment


def describe_experiment(experiment: Experiment) -> str:
    """The sentence about devices, rows and steps that a run shows before it trains."""
    config, data, examples = experiment.config, experiment.data, experiment.examples
    held = str(len(experiment.rows.get("validation", ())))
    if experiment.validates_by_loss and (dropped := experiment.validation.dropped):
        held += f" ({dropped} too long for their loss)"
    quantization = getattr(experiment.model, "quantization", None)
    return (f"{quantization}\n" if quantization else "") + (
        f"{config.model.path} on {_describe_devices(experiment)}; "
        f"task {data.task.name}: {examples.kept} examples to train on ({examples.dropped} dropped, "
        f"{examples.truncated} truncated), "
        f"{held} to validate on, {len(experiment.rows['test'])} to test on; {experiment.steps} steps a trial"
    )


def _describe_devices(experiment: Experiment) -> str:
    mesh, there, kind = experiment.mesh, jax.device_count(), jax.devices()[0].device_kind
    if mesh is None:
        return f"1 x {kind}" + (f" (of {there})" if there > 1 else "")
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    idle = f", {there - mesh.size} idle" if there > mesh.size else ""
    return f"{mesh.size} x {kind} ({axes}{idle}{f', {hosts.count()} processes' if hosts.count() > 1 else ''})"
