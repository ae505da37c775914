"""Export and conversion of models: ONNX, quantization, weights of open_clip."""
