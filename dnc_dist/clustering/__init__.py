"""Which learner trains on which row."""

from dnc_dist.clustering.divide import divide
from dnc_dist.clustering.division import Division, check_num_learners, match, whole
from dnc_dist.clustering.kmeans import KMeansResult, kmeans

__all__ = ["Division", "KMeansResult", "check_num_learners", "divide", "kmeans", "match", "whole"]
