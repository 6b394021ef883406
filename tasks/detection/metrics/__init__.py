"""Average precision as COCO, LVIS and Pascal VOC define it, each image counted once over all ranks."""

from tasks.detection.metrics.base import DetectionMetric, EncodedDetections, Summary
from tasks.detection.metrics.coco import CocoAP
from tasks.detection.metrics.lvis import LvisAP
from tasks.detection.metrics.voc import VocAP

__all__ = ["CocoAP", "DetectionMetric", "EncodedDetections", "LvisAP", "Summary", "VocAP"]
