"""Out of Python: ONNX files, and how fast a model really is."""
