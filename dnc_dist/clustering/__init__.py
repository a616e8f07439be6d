"""Which learner trains on which row."""

from dnc_dist.clustering.centroids import KMeansOptions, KMeansResult
from dnc_dist.clustering.divide import DivisionRules, divide
from dnc_dist.clustering.division import Division, check_num_learners, match, whole
from dnc_dist.clustering.features import Features, spread_features
from dnc_dist.clustering.groups import GroupRules, check_groups
from dnc_dist.clustering.kmeans import kmeans

__all__ = [
    "Division",
    "DivisionRules",
    "Features",
    "GroupRules",
    "KMeansOptions",
    "KMeansResult",
    "check_groups",
    "check_num_learners",
    "divide",
    "kmeans",
    "match",
    "spread_features",
    "whole",
]
