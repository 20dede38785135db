"""What user space reads about address spaces: /proc/PID/maps and PROCMAP_QUERY."""

from kmodel.proc.buildid import build_id_parse_file
from kmodel.proc.maps import (
    MapsVariant,
    maps_variants,
    proc_map_release,
    proc_maps,
    proc_maps_open,
    proc_maps_read,
    proc_maps_reads,
)
from kmodel.proc.query import (
    PROCMAP_QUERY,
    PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
    PROCMAP_QUERY_FILE_BACKED_VMA,
    PROCMAP_QUERY_VMA_EXECUTABLE,
    PROCMAP_QUERY_VMA_READABLE,
    PROCMAP_QUERY_VMA_SHARED,
    PROCMAP_QUERY_VMA_WRITABLE,
    ProcmapQuery,
    do_procmap_query,
    procmap_ioctl,
    procmap_query,
)
from kmodel.proc.seq_file import SeqFile, SeqOperations, mangle_path, seq_read
from kmodel.proc.show_map import d_path, get_vma_name, show_map_vma
from kmodel.proc.snapshot import get_vma_snapshot

__all__ = [
    "PROCMAP_QUERY",
    "PROCMAP_QUERY_COVERING_OR_NEXT_VMA",
    "PROCMAP_QUERY_FILE_BACKED_VMA",
    "PROCMAP_QUERY_VMA_EXECUTABLE",
    "PROCMAP_QUERY_VMA_READABLE",
    "PROCMAP_QUERY_VMA_SHARED",
    "PROCMAP_QUERY_VMA_WRITABLE",
    "MapsVariant",
    "ProcmapQuery",
    "SeqFile",
    "SeqOperations",
    "build_id_parse_file",
    "d_path",
    "do_procmap_query",
    "get_vma_name",
    "get_vma_snapshot",
    "mangle_path",
    "maps_variants",
    "proc_map_release",
    "proc_maps",
    "proc_maps_open",
    "proc_maps_read",
    "proc_maps_reads",
    "procmap_ioctl",
    "procmap_query",
    "seq_read",
    "show_map_vma",
]
