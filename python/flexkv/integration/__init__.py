"""Adapters: one package per engine."""
