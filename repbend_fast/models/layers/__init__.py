"""Layers in place of a model's own: LoRA's keyed forward, lean norms and MLPs, Liger's, and inputs that wait on the
host.
"""
