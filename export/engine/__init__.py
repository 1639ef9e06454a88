"""What export/engine/build.py needs to build engines: targets, memory, and the only user of TensorRT's API."""
