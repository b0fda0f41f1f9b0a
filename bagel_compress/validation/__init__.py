"""Validation: compares an artifact or export with traces of its source and with targets, or several builds."""
