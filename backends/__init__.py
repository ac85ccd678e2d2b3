"""Backends: each lowers a Program to an artefact and can run and check it on this machine."""
