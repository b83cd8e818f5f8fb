"""Declares the keys for training: the optimizer, validation, the mesh, checkpoints and records."""

from __future__ import annotations

from mlora_jax.config.checks import check_parallel, check_train, check_validation
from mlora_jax.config.schema import Group, Key

TRAIN = Group(
    doc="How every trial is trained: AdamW with a linearly falling learning rate.",
    check=check_train,
    keys={
        "epochs": Key(default=3, low=1, doc="Every training row is seen this many times."),
        "batch_size": Key(
            default=32, low=1, doc="An optimizer step takes this many sequences, a multiple of train.accumulation."
        ),
        "accumulation": Key(
            default=1,
            low=1,
            doc="An optimizer step has this many micro-batches. A policy that draws for each micro-batch draws so "
            "often, and an accelerator computes about as many rows at a time as one of them fills.",
        ),
        "warmup_steps": Key(
            default=0, low=0, doc="The learning rate rises linearly over this many optimizer steps at the start."
        ),
        "beta1": Key(default=0.9, low=0.0, high=0.999999, doc="Adam's first moment decays by this factor per step."),
        "beta2": Key(default=0.999, low=0.0, high=0.999999, doc="Adam's second moment decays by this factor per step."),
        "epsilon": Key(default=1e-8, low=0.0, doc="Adam adds this number to the root of the second moment."),
        "weight_decay": Key(default=0.0, low=0.0, doc="AdamW's decay is this number times the learning rate per step."),
        "clip": Key(default=1.0, low=0.0, doc="Gradients are scaled down to this global norm. 0 turns clipping off."),
        "row_widths": Key(
            default=(),
            entry=int,
            low=1,
            distinct=True,
            form="a tuple of integers",
            doc="Examples are packed into rows of these many tokens; the largest holds every example. () chooses the "
            "widths that leave the least padding on a CPU, and one width on an accelerator.",
        ),
        "rows_at_once": Key(
            default=0,
            low=0,
            doc="This many packed rows are computed at one time. 0 takes one on a CPU, and as many as a micro-batch "
            "fills on an accelerator.",
        ),
        "loss_chunk": Key(
            default=1024, low=1, doc="The logits of at most this many answer positions exist at one time."
        ),
        "log_every": Key(default=10, low=1, doc="A line is written to metrics.jsonl every so many optimizer steps."),
        "remat": Key(
            default="auto",
            choices=("auto", "none", "dots", "full"),
            former={"false": "none", "true": "full"},
            doc='The backward pass computes this much of a layer again, so that less is kept: "none" keeps all '
            'activations, "dots" keeps the products with weights and computes the rest again, such as attention, '
            'and "full" keeps the inputs of the layers only. "auto" is "dots" for a model of more than 8 layers, else '
            '"none". The former values False and True are "none" and "full".',
        ),
        "trials_at_once": Key(
            default=0,
            low=0,
            changeable=True,
            doc="This many trials are trained in one batch. 0 takes as many as fit in memory, but on a "
            "CPU one if that is faster.",
        ),
        "memory_gib": Key(
            default=0.0,
            low=0.0,
            changeable=True,
            doc="A batch of trials may take this much memory, in GiB. 0 takes what the device reports, or 8 on a CPU.",
        ),
    },
)

VALIDATION = Group(
    doc="Validation on the data set's own validation split, or else on rows held out of its training split.",
    check=check_validation,
    keys={
        "holdout": Key(
            default=0.1, low=0.0, high=0.99, doc="This share of the training rows is held out. 0 holds none out."
        ),
        "limit": Key(
            default=512,
            low=1,
            doc="At most this many rows are held out, or taken from the data set's own validation split.",
        ),
        "every": Key(
            default=0,
            low=0,
            doc="A trial is validated every so many optimizer steps while it trains. 0 validates at its end only.",
        ),
        "measure": Key(
            default="aurac",
            choices=("aurac", "loss"),
            doc="Validations while training look at this measure of the prefixes: the AURAC over log2 "
            "rank, or the mean loss.",
        ),
        "keep": Key(
            default="last",
            choices=("last", "best"),
            doc='A trial ends with its last adapter, or with the best one by these validations. "best" '
            "needs validation.every.",
        ),
        "patience": Key(
            default=0,
            low=0,
            doc="A trial stops after this many validations without a better one, which needs "
            "validation.every. 0 never stops it.",
        ),
    },
)

_MESH_SIZE = "at least 1, or -1 for all devices that the other axes leave"
PARALLEL = Group(
    doc="The mesh over all devices of all processes. The sizes of its axes multiply to the number of devices.",
    check=check_parallel,
    changeable=True,
    keys={
        "trial": Key(default=1, form=_MESH_SIZE, doc="This many groups of devices train trials side by side."),
        "data": Key(
            default=-1, form=_MESH_SIZE, doc="The rows of a batch are cut into this many parts, each with its own base."
        ),
        "fsdp": Key(
            default=1,
            form=_MESH_SIZE,
            doc="The rows of a batch are cut into this many parts that share one base, gathered layer by "
            "layer, one adapter and one optimizer state.",
        ),
        "tensor": Key(default=1, form=_MESH_SIZE, doc="The features of every layer are cut into this many parts."),
        "engine": Key(
            default="jit",
            choices=("jit", "pmap"),
            doc='The training step is compiled by this function. "pmap" cuts the rows only and needs one process.',
        ),
        "distributed": Key(
            default=False,
            doc="This process joins others: those of the cluster that jax detects (SLURM, GKE, Cloud TPU, "
            "Open MPI), or those that the next three keys name.",
        ),
        "coordinator_address": Key(default="", form="HOST:PORT", doc="This is the address of the first process."),
        "num_processes": Key(default=0, low=0, doc="This many processes run in all. 0 leaves it to the cluster."),
        "process_id": Key(
            default=-1, low=-1, doc="This is the number of this process, 0 for the first. -1 leaves it to the cluster."
        ),
    },
)

CHECKPOINT = Group(
    doc="Checkpoints, from which a stopped run goes on.",
    changeable=True,
    keys={
        "every": Key(
            default=100,
            low=0,
            doc="A checkpoint is saved every so many optimizer steps. 0 saves at the end of a batch of trials only.",
        ),
        "keep": Key(default=2, low=1, doc="This many checkpoints of a batch are kept while it trains."),
    },
)

COMPILATION = Group(
    doc="How programs are compiled.",
    changeable=True,
    keys={
        "cache": Key(
            default="",
            form='a folder or "off"',
            doc="Compiled programs are kept in this folder, from which the next start takes them. "
            '"" is mlora_jax/compiled in the user\'s cache folder, and "off" keeps none. If the environment variable '
            "JAX_COMPILATION_CACHE_DIR is set, its folder is taken whatever the key says.",
        ),
    },
)

RECORDS = Group(
    doc="Records besides metrics.jsonl and curves.jsonl.",
    changeable=True,
    keys={
        "tensorboard": Key(default=False, doc="Event files for TensorBoard are written to WORKDIR/tensorboard."),
        "wandb_project": Key(
            default="",
            form="a project's name",
            doc='Metrics go to this project of Weights & Biases, which must be installed. "" sends none.',
        ),
    },
)
