"""Nested ranks of the KV cache: orthogonal projections of keys and values whose first entries are a good short cache.

from mlora_jax.kv_cache import Ranks, principal_components, project, uniform_ranks

projections = principal_components(model, batches)
small = project(model, projections, uniform_ranks(0.5, *projections.shape), cut=True)
"""

from mlora_jax.kv_cache.attention import ProjectedAttention, Projections, cache_shape, identity, project
from mlora_jax.kv_cache.cut import CutCache, CutForm, cache_bytes
from mlora_jax.kv_cache.folder import SavedProjections, load_projections, read_projected, save_projections
from mlora_jax.kv_cache.orthogonal import cayley, orthogonality_error
from mlora_jax.kv_cache.pca import principal_components
from mlora_jax.kv_cache.ranks import RATES, RankPath, Ranks, uniform_ranks
from mlora_jax.kv_cache.search import Measured, Meter, search_ranks
from mlora_jax.kv_cache.training import draw_ranks, train_projections

__all__ = [
    "RATES",
    "CutCache",
    "CutForm",
    "Measured",
    "Meter",
    "ProjectedAttention",
    "Projections",
    "RankPath",
    "Ranks",
    "SavedProjections",
    "cache_bytes",
    "cache_shape",
    "cayley",
    "draw_ranks",
    "identity",
    "load_projections",
    "orthogonality_error",
    "principal_components",
    "project",
    "read_projected",
    "save_projections",
    "search_ranks",
    "train_projections",
    "uniform_ranks",
]
