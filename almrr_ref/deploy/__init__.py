"""The deployed forms of the network: folded, as a CUDA graph, as ONNX; and what all forms share, predictor.py."""
