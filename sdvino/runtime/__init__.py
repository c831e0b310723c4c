"""Where and how the graphs run: devices, compiled components, their cache and memory (OpenVINO)."""
