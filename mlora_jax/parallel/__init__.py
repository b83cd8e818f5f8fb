"""Many devices and many hosts: the mesh, where every array lies on it, and what processes have to agree on."""
