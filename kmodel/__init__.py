"""kmodel: the Linux kernel's lockless uprobe lookup and per-VMA locking, as readable Python.

The rooms of the package import each other in one direction only (docs/reading-order.md):
core -> sync -> rcu -> slab -> fs -> mm -> uprobes -> proc -> torture -> explore -> hazards -> cli.
"""

__version__ = "0.1.0"
