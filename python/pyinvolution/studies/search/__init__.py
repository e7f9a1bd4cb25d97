"""Architecture search over convolution and involution: a space, a one-shot supernet, and a multi-objective search.

It needs the extra ``search``: ``pip install "pyinvolution[search]"``.
"""

from pyinvolution.studies.search.data import HeldOut
from pyinvolution.studies.search.space import OPERATORS, SearchSpace, StageChoice, StageSpace
from pyinvolution.studies.search.supernet import OneShot, Supernet

__all__ = ["OPERATORS", "HeldOut", "OneShot", "SearchSpace", "StageChoice", "StageSpace", "Supernet"]
