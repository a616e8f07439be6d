"""The report of a run: one HTML file with its curves, divisions and nearest neighbours."""

from dnc_dist.report.gallery import gallery_image
from dnc_dist.report.page import build_report

__all__ = ["build_report", "gallery_image"]
