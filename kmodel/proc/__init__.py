"""What user space reads about address spaces: /proc/PID/maps."""

from kmodel.proc.maps import get_vma_name, proc_maps, show_map_vma

__all__ = ["get_vma_name", "proc_maps", "show_map_vma"]
