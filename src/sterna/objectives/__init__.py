"""Objectives: what is minimised. They add, scale and wrap."""

from sterna.objectives.algebra import Composable, MeanOutput, Scaled, Sum, penalty_only
from sterna.objectives.augment import Augment
from sterna.objectives.cross_entropy import CrossEntropy

__all__ = ["Augment", "Composable", "CrossEntropy", "MeanOutput", "Scaled", "Sum", "penalty_only"]
