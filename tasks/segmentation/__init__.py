"""Segmentors and their parts: plain modules and functions."""

from tasks.segmentation.inference import SlidingWindow, TestTime
from tasks.segmentation.mask2former import Mask2Former
from tasks.segmentation.segformer import SegFormer
from tasks.segmentation.segmentor import PixelSegmentor
from tasks.segmentation.upernet import UPerNet

__all__ = ["Mask2Former", "PixelSegmentor", "SegFormer", "SlidingWindow", "TestTime", "UPerNet"]
