"""Checks what users pass, before anything is changed."""
