"""Semantic segmentation: the recipe, data in the tree of Cityscapes, a small data set like it, and figures."""
