"""Runs with several processes: how the processes are started, share networks and communicate."""
