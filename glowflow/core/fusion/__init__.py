"""Fusion: how tokens of media and text come together; ``model.fusion`` names one."""
