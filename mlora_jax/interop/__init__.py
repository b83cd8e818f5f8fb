"""Adapters in the formats of other programs: export and import of PEFT adapters, and merged Hugging Face folders."""

from mlora_jax.interop.merged import export_merged
from mlora_jax.interop.own_format import export_adapter
from mlora_jax.interop.peft_export import RANKS_FOR, accepted_rank, export_peft
from mlora_jax.interop.peft_import import import_peft, start_from_peft

__all__ = [
    "RANKS_FOR",
    "accepted_rank",
    "export_adapter",
    "export_merged",
    "export_peft",
    "import_peft",
    "start_from_peft",
]
