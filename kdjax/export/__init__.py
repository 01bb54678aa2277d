"""A trained model as files that a device runs: ONNX, StableHLO, safetensors, LiteRT, each in a folder of its own."""
