"""Weight compression, quantization and calibration. Needs the convert extra."""
