"""What the numbers of a run, or of a model's forward, say about its heads."""

from __future__ import annotations

from attncap.analysis.ablation import PruningPoint, ablate, pruning_curve
from attncap.analysis.circuits import Circuits, circuits, composition
from attncap.analysis.compare import Comparison, HeadDifference, compare
from attncap.analysis.detect import detect_head
from attncap.analysis.drift import FocusDrift, focus_drift, token_trigger
from attncap.analysis.groups import HeadPreference, Preferences, group_preference
from attncap.analysis.importance import head_importance, leave_one_out
from attncap.analysis.mixing import MixingRatio, mixing_ratio
from attncap.analysis.output_weight import OutputWeight, output_weight, rank_correlation
from attncap.analysis.patch_distance import patch_distance
from attncap.analysis.patterns import (
    HeadPattern,
    Needle,
    PositionalHead,
    find_patterns,
    positional_heads,
    retrieval_scores,
)
from attncap.analysis.results import (
    Column,
    Result,
    ResultDamagedError,
    head_places,
    read_result,
    read_results,
    result_path,
    save_result,
)
from attncap.analysis.roles import HeadRole, Role, RoleResult, find_roles
from attncap.analysis.similarity import HeadDistances, clusters, coordinates, head_distances
from attncap.analysis.syntax import BestHead, Sentence, Syntax, dependency_accuracy, read_conllu, word_encoder

__all__ = [
    "BestHead",
    "Circuits",
    "Column",
    "Comparison",
    "FocusDrift",
    "HeadDifference",
    "HeadDistances",
    "HeadPattern",
    "HeadPreference",
    "HeadRole",
    "MixingRatio",
    "Needle",
    "OutputWeight",
    "PositionalHead",
    "Preferences",
    "PruningPoint",
    "Result",
    "ResultDamagedError",
    "Role",
    "RoleResult",
    "Sentence",
    "Syntax",
    "ablate",
    "circuits",
    "clusters",
    "compare",
    "composition",
    "coordinates",
    "dependency_accuracy",
    "detect_head",
    "find_patterns",
    "find_roles",
    "focus_drift",
    "group_preference",
    "head_distances",
    "head_importance",
    "head_places",
    "leave_one_out",
    "mixing_ratio",
    "output_weight",
    "patch_distance",
    "positional_heads",
    "pruning_curve",
    "rank_correlation",
    "read_conllu",
    "read_result",
    "read_results",
    "result_path",
    "retrieval_scores",
    "save_result",
    "token_trigger",
    "word_encoder",
]
