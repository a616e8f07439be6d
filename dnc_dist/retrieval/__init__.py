"""How well embeddings find images of the same class."""

from dnc_dist.retrieval.metrics import nmi
from dnc_dist.retrieval.protocols import RetrievalResult, evaluate, resolve_protocol
from dnc_dist.retrieval.search import Neighbours, topk

__all__ = ["Neighbours", "RetrievalResult", "evaluate", "nmi", "resolve_protocol", "topk"]
