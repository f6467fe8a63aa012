"""Restoration networks, one readable file each, and the facts they carry."""
