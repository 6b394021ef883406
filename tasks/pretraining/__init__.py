"""Image-text pretraining: two towers, the objectives that train them, and what they are measured by."""

from tasks.pretraining.m3i import M3I
from tasks.pretraining.objectives import Clip, Objective, SigLip
from tasks.pretraining.task import Pretraining
from tasks.pretraining.text import BertText, ClipText
from tasks.pretraining.towers import TextFactory, Towers

__all__ = ["M3I", "BertText", "Clip", "ClipText", "Objective", "Pretraining", "SigLip", "TextFactory", "Towers"]
