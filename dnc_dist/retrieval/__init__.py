"""How well embeddings find images of the same class."""

from __future__ import annotations

from dnc_dist.retrieval.metrics import nmi
from dnc_dist.retrieval.protocols import Columns, Protocol, RetrievalResult, RolesProtocol, evaluate
from dnc_dist.retrieval.search import Neighbours, place_of_match, topk

__all__ = ["Columns", "Neighbours", "Protocol", "RetrievalResult", "RolesProtocol", "evaluate", "nmi", "place_of_match", "topk"]
