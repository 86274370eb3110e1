"""The deployed forms of the network: folded, as a CUDA graph, as ONNX; and the stream from files to maps."""
