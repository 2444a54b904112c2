"""Datasets in, metrics, and the statistical gate. Pure where it can be; knows nothing of ONNX or torch."""
