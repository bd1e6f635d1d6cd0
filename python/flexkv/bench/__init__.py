"""Measurements that move real bytes through the whole path: node, client and rank agent."""
