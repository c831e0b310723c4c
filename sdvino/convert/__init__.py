"""Sources, model families and export to OpenVINO IR. Needs the convert extra."""
