"""What the numbers of a run say about its heads."""

from __future__ import annotations

from attncap.analysis.roles import HeadRole, Role, RoleResult, find_roles

__all__ = ["HeadRole", "Role", "RoleResult", "find_roles"]
