"""Devices as a mesh, and the processes of one run."""
