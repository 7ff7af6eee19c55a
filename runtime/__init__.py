"""What runs on the device. Never imports torch, transformers, optimum or onnx."""
