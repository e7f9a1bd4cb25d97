"""Blocks that others add to a residual network, for comparison with involution.

Each is a module (N, C, H, W) -> (N, C, H, W), built from the number of channels and, where it replaces a convolution, a
stride. `create_block` finds them by name, `insert_block` puts one where its authors do.
"""

from pyinvolution.blocks._registry import BLOCKS, create_block, insert_block
from pyinvolution.blocks.criss_cross import CrissCross2d
from pyinvolution.blocks.global_context import GlobalContext2d
from pyinvolution.blocks.non_local import NonLocal2d

__all__ = ["BLOCKS", "CrissCross2d", "GlobalContext2d", "NonLocal2d", "create_block", "insert_block"]
