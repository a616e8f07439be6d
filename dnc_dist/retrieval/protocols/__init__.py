"""Protocols: one file for each. A protocol says who asks and who is searched, and measures it."""

from __future__ import annotations

from dnc_dist.retrieval.protocols.base import Columns, Protocol, Queries, RetrievalResult
from dnc_dist.retrieval.protocols.exact import evaluate
from dnc_dist.retrieval.protocols.roles import RolesProtocol

__all__ = ["Columns", "Protocol", "Queries", "RetrievalResult", "RolesProtocol", "evaluate"]
