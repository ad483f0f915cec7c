"""Object detection on PASCAL VOC with a pretrained trunk."""
