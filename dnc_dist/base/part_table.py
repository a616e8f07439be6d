"""The names of all parts: the only list of them. It imports nothing, so that ``--help`` can name them at once."""

from __future__ import annotations

TABLE: dict[str, dict[str, str]] = {
    "loss": {
        "margin": "dnc_dist.loss.margin:MarginLoss",
        "proxy_anchor": "dnc_dist.loss.proxy_anchor:ProxyAnchorLoss",
        "triplet": "dnc_dist.loss.triplet:TripletLoss",
        "contrastive": "dnc_dist.loss.contrastive:ContrastiveLoss",
        "n_pairs": "dnc_dist.loss.n_pairs:NPairsLoss",
        "multi_similarity": "dnc_dist.loss.multi_similarity:MultiSimilarityLoss",
        "supcon": "dnc_dist.loss.supcon:SupConLoss",
        "circle": "dnc_dist.loss.circle:CircleLoss",
        "smooth_ap": "dnc_dist.loss.smooth_ap:SmoothAPLoss",
        "arcface": "dnc_dist.loss.arcface:ArcFaceLoss",
        "soft_triple": "dnc_dist.loss.soft_triple:SoftTripleLoss",
        "pml": "dnc_dist.loss.pml:PmlLoss",
    },
    "reader": {
        "glyphs": "dnc_dist.data.readers.glyphs:GlyphsReader",
        "folder": "dnc_dist.data.readers.folder:FolderReader",
        "csv": "dnc_dist.data.readers.csv:CsvReader",
        "cub200": "dnc_dist.data.readers.cub200:Cub200Reader",
        "cars196": "dnc_dist.data.readers.cars196:Cars196Reader",
        "sop": "dnc_dist.data.readers.sop:SopReader",
        "inshop": "dnc_dist.data.readers.inshop:InshopReader",
        "vehicleid": "dnc_dist.data.readers.vehicleid:VehicleIdReader",
    },
    "protocol": {
        "auto": "dnc_dist.retrieval.protocols.auto:Auto",
        "leave-one-out": "dnc_dist.retrieval.protocols.leave_one_out:LeaveOneOut",
        "query-gallery": "dnc_dist.retrieval.protocols.query_gallery:QueryGallery",
        "vehicleid-loo": "dnc_dist.retrieval.protocols.vehicleid_loo:VehicleIdLeaveOneOut",
        "vehicleid-random10": "dnc_dist.retrieval.protocols.vehicleid_random10:VehicleIdRandom10",
    },
    "backbone": {
        "conv4": "dnc_dist.model.backbone.conv4:Conv4",
    },
    "mask": {
        "learned": "dnc_dist.model.masks.learned:LearnedMasks",
        "fixed": "dnc_dist.model.masks.fixed:FixedMasks",
        "sliced": "dnc_dist.model.masks.sliced:SlicedMasks",
    },
    "augmentation": {
        "none": "dnc_dist.data.augmentations.none:NoAugmentation",
        "light": "dnc_dist.data.augmentations.light:Light",
        "standard": "dnc_dist.data.augmentations.standard:Standard",
        "color": "dnc_dist.data.augmentations.color:Color",
        "geom": "dnc_dist.data.augmentations.geom:Geom",
        "geom_color": "dnc_dist.data.augmentations.geom_color:GeomColor",
    },
    "tracker": {
        "wandb": "dnc_dist.trackers.wandb:WandbTracker",
        "tensorboard": "dnc_dist.trackers.tensorboard:TensorBoardTracker",
        "jsonl": "dnc_dist.rundir.tracker:JsonlTracker",
    },
}
"""Kind of part -> short name -> ``module:Class``."""
BASES = {
    "loss": "dnc_dist.loss.base:Loss",
    "reader": "dnc_dist.data.readers:Reader",
    "protocol": "dnc_dist.retrieval.protocols.base:Protocol",
    "backbone": "dnc_dist.model.backbone.base:Backbone",
    "mask": "dnc_dist.model.masks.base:SubspaceMasks",
    "augmentation": "dnc_dist.data.augmentations.base:Augmentation",
    "tracker": "dnc_dist.rundir.tracker:Tracker",
}
"""Kind of part -> the class that every part of the kind derives from."""
OTHER_NAMES = {"backbone": "dnc_dist.model.backbone.timm:TimmBackbone"}
"""Kind of part -> what takes every name that is not in the table: a backbone of any other name is a model of timm."""
