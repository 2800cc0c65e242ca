"""Objectives: what is minimised. They add, scale and wrap."""

from sterna.objectives.algebra import Composable, MeanOutput, Scaled, Sum, penalty_only
from sterna.objectives.augment import Augment
from sterna.objectives.cross_entropy import CrossEntropy
from sterna.objectives.force import Force
from sterna.objectives.group_lasso import GroupLasso, zero_groups
from sterna.objectives.groups import Part, cut
from sterna.objectives.proximal import land, proximal_step

__all__ = [
    "Augment",
    "Composable",
    "CrossEntropy",
    "Force",
    "GroupLasso",
    "MeanOutput",
    "Part",
    "Scaled",
    "Sum",
    "cut",
    "land",
    "penalty_only",
    "proximal_step",
    "zero_groups",
]
