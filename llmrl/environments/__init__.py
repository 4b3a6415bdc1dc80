"""Environments that ship with llmrl. The protocol: llmrl/environment.py."""
