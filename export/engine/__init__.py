"""Build engines from ONNX graphs: targets, profiles, plugins, memory, and the only module that uses TensorRT's API."""
