"""Address spaces: the maple tree, mm_struct and mmap_lock, VMAs and their locks, mmap and munmap."""
