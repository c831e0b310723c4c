"""Devices, compiled components and their cache. OpenVINO lives here."""
