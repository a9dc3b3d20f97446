"""Sections of the report page, one file per kind of stage."""
