"""What the numbers of a run, or of a model's forward, say about its heads."""

from __future__ import annotations

from attncap.analysis.ablation import PruningPoint, ablate, pruning_curve
from attncap.analysis.circuits import Circuits, circuits, composition
from attncap.analysis.compare import Comparison, HeadDifference, compare
from attncap.analysis.detect import detect_head
from attncap.analysis.importance import head_importance
from attncap.analysis.roles import HeadRole, Role, RoleResult, find_roles

__all__ = [
    "Circuits",
    "Comparison",
    "HeadDifference",
    "HeadRole",
    "PruningPoint",
    "Role",
    "RoleResult",
    "ablate",
    "circuits",
    "compare",
    "composition",
    "detect_head",
    "find_roles",
    "head_importance",
    "pruning_curve",
]
