"""How well embeddings find images of the same class."""

from dnc_dist.retrieval.metrics import nmi
from dnc_dist.retrieval.protocols import RetrievalResult, evaluate, resolve_protocol
from dnc_dist.retrieval.search import Neighbours, place_of_match, topk
from dnc_dist.retrieval.vehicleid import evaluate_lists

__all__ = ["Neighbours", "RetrievalResult", "evaluate", "evaluate_lists", "nmi", "place_of_match", "resolve_protocol", "topk"]
