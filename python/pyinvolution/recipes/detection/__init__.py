"""Detection and instance segmentation: the COCO recipe of the paper, and a small data set in COCO's layout."""
