"""What drivers share whose machines are processes with a keeper: its client, the run folder, control groups, sparse disks.

No VMM is known here: QEMU, gVisor and Firecracker each build on this room and know nothing of each other.
"""
