"""Nodes: composition roots. The only importer of concrete drivers, blob stores and databases; it decides nothing."""
