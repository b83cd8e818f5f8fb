"""Runs on several devices and hosts: the mesh, the sharding of every array, and what the processes agree on."""
