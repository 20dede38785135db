"""Uprobes of the model beside the running kernel's."""
