"""Transfer to detection (appendix A): Faster R-CNN on Pascal VOC and COCO."""
